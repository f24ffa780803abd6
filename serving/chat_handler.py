"""transformers' handler of chat completions, with what our server does differently for a single request."""

from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler

from .continuous import TextBatching, joins_batch, may_join

# Attribute of a request's GenerationConfig that holds its seed until its turn comes.
SEED = "request_seed"


class ChatHandler(ChatCompletionHandler):
    """Samples where a request says how, and from its own seed; lets texts join the batch, if there is one."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if isinstance(self.generation_state, TextBatching):
            _, model, _ = self._resolve_model(body)
            joins_batch.set(may_join(body, model.generation_config))
        return await super().handle_request(body, request_id)

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
