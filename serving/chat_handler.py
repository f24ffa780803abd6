"""transformers' handler of chat completions, with what our server does differently for a single request."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.responses import StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler

from .continuous import TextBatching, joins_batch, may_join
from .event_stream import finished

# Attribute of a request's GenerationConfig that holds its seed until its turn comes.
SEED = "request_seed"
# Requests whose media are decoded at a time: more would only hold more memory.
_DECODED_AT_ONCE = 4


class ChatHandler(ChatCompletionHandler):
    """Samples where a request says how, and from its own seed; lets texts join the batch, if there is one.

    The processor gives it inputs that are yet to be made, see `later_inputs`. Answers begin with a word and go by the
    model's name as clients know it; streams end as OpenAI's do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decoders = ThreadPoolExecutor(_DECODED_AT_ONCE, thread_name_prefix="inputs")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if isinstance(self.generation_state, TextBatching):
            _, model, _ = self._resolve_model(body)
            joins_batch.set(may_join(body, model.generation_config))
        response = await super().handle_request(body, request_id)
        if inspect.isawaitable(response):  # what `_streaming` is here, transformers' handler does not wait for
            response = await response
        if isinstance(response, StreamingResponse):
            response.body_iterator = finished(response.body_iterator)  # type: ignore[arg-type]
        return response

    async def _streaming(  # type: ignore[override]
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, *args: Any, **kwargs: Any
    ) -> StreamingResponse:
        inputs = await inputs.made(self._decoders)
        return super()._streaming(request_id, model, processor, model_id, inputs, *args, **kwargs)

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = await inputs.made(self._decoders)
        return await super()._non_streaming(request_id, model, processor, model_id, inputs, *args, **kwargs)

    def _build_completion(self, request_id: str, content: str, model_id: str, *args: Any, **kwargs: Any) -> Any:
        name = self.model_manager.force_model
        return super()._build_completion(request_id, content.lstrip(), name, *args, **kwargs)

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        return super()._build_chunk_sse(*args, **{**kwargs, "model": self.model_manager.force_model})

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        # transformers would seed here, while other requests are drawing, and leave a model greedy that is so by default.
        without_seed = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(without_seed, model_generation_config, use_cb=use_cb)
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
            config.do_sample = True
        if body.get("seed") is not None:
            setattr(config, SEED, body["seed"])
        return config
