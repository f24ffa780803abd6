"""transformers' OpenAI-compatible server for one model of ours.

`transformers serve MODEL` works on our folders too. What is added here: a request that cannot be answered gets a 4xx that
says why (there it is a 500 without a reason), clients cannot name files or addresses for the server to open, requests
and prompts have a greatest length, /v1/models lists the model that is served, no request loads another, a request draws
from its own seed, and texts are batched continuously if asked for. docs/serving.md compares the two.
"""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cli.serve import Serve
from transformers.utils import logging

from ..errors import RequestError, UniMoeError
from ..processing.media_policy_unimoe import MediaLimits, MediaPolicy
from ..processing.perception.choice import PerceiverChoice
from ..processing.sound_tracks_unimoe import with_sound_tracks
from ..quantization import quantization_config
from .chat_handler import SEED, ChatHandler
from .continuous import TextBatching, require_batchable
from .later_inputs import postponed
from .media_needs import MediaPlanner
from .request_guard import CHAT, RequestGuard, error_body
from .sight import let_perceive

logger = logging.get_logger(__name__)

# What transformers lets a request have that says nothing.
_NEW_TOKENS = 1024
# Texts of the model's greatest length that the cache of continuous batching holds, unless told otherwise.
_CACHED_TEXTS = 4


@dataclass(frozen=True)
class ServerSettings:
    """How a model is served.

    Args:
        model: folder or Hub id; also the name that clients may give.
        host, port: where it listens.
        device, dtype: as in `transformers serve`.
        longest_body: bytes of one request, media included.
        continuous_batching: whether requests of text alone are generated together; see `continuous`.
        cache_tokens: what the cache of these holds; None: four texts of the model's greatest length.
        limits: of the media in a request.
        media_hosts: from which the server fetches media for its clients, over https; usually none.
        quantize: hold the weights in "int8" or "int4".
        perception, no_perception: vision models that look at images for a model with mixers, see `let_perceive`.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    longest_body: int = 64 << 20
    continuous_batching: bool = False
    cache_tokens: int | None = None
    limits: MediaLimits = field(default_factory=MediaLimits)
    media_hosts: frozenset[str] = frozenset()
    quantize: str | None = None
    perception: PerceiverChoice | None = None
    no_perception: bool = False


class ModelServer(Serve):
    """Loads the model at once; `run()` then serves until it is stopped. `note`: what `let_perceive` says.

    Needs the extra `serve`.

    Raises:
        UniMoeError: the model cannot be batched continuously, or the cache is too small for one text.
    """

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(
            device=settings.device,
            dtype=settings.dtype,
            host=settings.host,
            port=settings.port,
            non_blocking=True,
        )
        self.settings = settings
        loaded = self._load()
        context = loaded.model.config.get_text_config().max_position_embeddings
        hosts = settings.media_hosts
        loaded.processor.media_policy = MediaPolicy(
            allow_paths=False, allow_network=bool(hosts), allowed_hosts=hosts, limits=settings.limits
        )
        _limit_prompts(loaded.processor, loaded.model)
        _generate_with_tokenizer_and_seed(loaded.model, loaded.processor.tokenizer)
        if settings.continuous_batching:
            self._generation_state = _batching(loaded.model, context, settings.cache_tokens)
        seeing = (settings.perception, settings.no_perception)
        self.note = let_perceive(settings.model, loaded.model, loaded.processor, *seeing)
        self._add_to_app(self.server.config.app, context)

    def _load(self) -> Any:
        """transformers loads; it knows bitsandbytes only, so what it quantises with is set before."""
        manager: Any = self._model_manager
        if self.settings.quantize is not None:
            chosen = quantization_config(self.settings.quantize)
            manager.get_quantization_config = lambda: chosen
        manager.force_model, manager.model_timeout = self.settings.model, -1
        manager.load_model_and_processor(manager.process_model_name(self.settings.model))
        [loaded] = manager.loaded_models.values()
        return loaded

    def start_server(self) -> None:
        """Nothing yet: transformers calls this before the app is complete."""

    def run(self) -> None:
        """Serve until the process is interrupted, or `stop` is called from another thread."""
        try:
            self.server.run()
        finally:
            self._generation_state.shutdown()

    def stop(self) -> None:
        self.server.should_exit = True

    def _add_to_app(self, app: Any, context: int) -> None:
        from fastapi import Request
        from fastapi.responses import JSONResponse
        from starlette.exceptions import HTTPException

        async def refused(_: Request, error: Exception) -> JSONResponse:
            status, reason = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, error)
            return JSONResponse(error_body(str(reason)), status_code=status)

        handler = ChatHandler(self._model_manager, self._generation_state)

        async def chat(request: Request) -> Any:
            # The guard has read and checked it, whatever its headers call it.
            return await handler.handle_request(json.loads(await request.body()), request.state.request_id)

        def health() -> JSONResponse:
            alive = self._generation_state.is_cb_alive()
            return JSONResponse({"status": "ok" if alive else "the batch has failed: restart"}, 200 if alive else 503)

        def served_models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": self.settings.model, "object": "model", "owned_by": "unimoe"}]}

        for kind in (UniMoeError, HTTPException):
            app.add_exception_handler(kind, refused)
        app.add_middleware(RequestGuard, longest_body=self.settings.longest_body, longest_answer=context)
        app.router.routes.clear()  # transformers' others load models by name, unload ours, or are not checked here
        app.get("/v1/models")(served_models)
        app.get("/health")(health)
        app.post(CHAT)(chat)


def _batching(model: Any, context: int, cache_tokens: int | None) -> TextBatching:
    require_batchable(model)
    needed = context + max(context, _NEW_TOKENS)
    if cache_tokens is not None and cache_tokens < needed:
        raise UniMoeError(
            f"--cache-tokens is {cache_tokens}; one conversation of this model and its answer may take {needed}: give at "
            "least as many."
        )
    return TextBatching(cache_tokens or max(_CACHED_TEXTS * context, needed))


def _generate_with_tokenizer_and_seed(model: Any, tokenizer: Any) -> None:
    """Texts that end an answer (`stop`) need a tokenizer; transformers hands over the processor, which is none.

    Here, where only one request at a time generates, its seed is set too.
    """
    generate = model.generate

    @functools.wraps(generate)
    def with_tokenizer(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        seed = generation_config.__dict__.pop(SEED, None)
        if seed is not None:
            torch.manual_seed(seed)
        return generate(*args, generation_config=generation_config, **{**kwargs, "tokenizer": tokenizer})

    model.generate = with_tokenizer


def _limit_prompts(processor: Any, model: Any) -> None:
    """Refuse prompts that the model has no positions for, or the machine no memory, before media are decoded.

    transformers would generate behind the last position. What the processor gives from now on are `LaterInputs`.
    """
    make_inputs = processor.apply_chat_template
    context = model.config.get_text_config().max_position_embeddings
    planner = MediaPlanner(processor, model)

    @functools.wraps(make_inputs)
    def within_context(messages: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("load_audio_from_video") and getattr(processor, "feature_extractor", None) is not None:
            messages = with_sound_tracks(messages, processor.media_policy)
        needs = planner.needs(messages, _NEW_TOKENS)
        needs.require_room()
        if needs.is_worth_a_line:
            logger.warning(str(needs))
        inputs = make_inputs(messages, *args, **kwargs)
        length = len(inputs["input_ids"][0])
        if length >= context:
            raise RequestError(
                f"The conversation has {length:,} tokens, media included; the model takes fewer than {context:,}. "
                "Shorten it."
            )
        if kwargs.get("return_tensors") is None:  # continuous batching takes the ids of one text
            inputs["input_ids"] = inputs["input_ids"][0]
        return inputs

    processor.apply_chat_template = postponed(within_context)
