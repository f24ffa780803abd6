"""What `UniMoeModel` and `UniMoeForCausalLM` have in common: what they support, how they start, load and are saved."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_torchao_available, is_torchvision_available

from .checkpoint_layouts_unimoe import FusedCheckpointMixin
from .configuration_unimoe import AUTO_MAP, UniMoeConfig
from .connectors_unimoe import init_connector_weights
from .linear_experts_unimoe import use_linear_experts, wants_linear_experts
from .modeling_unimoe_moai import init_moai_weights


class UniMoePreTrainedModel(FusedCheckpointMixin, PreTrainedModel):
    config: UniMoeConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Connected features are scattered into the text by position, which a static graph cannot capture.
    _can_compile_fullgraph = False

    def __init__(self, config: UniMoeConfig) -> None:
        super().__init__(config)
        self.input_modalities = _input_modalities(config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in this module's text; the experts are in modeling_unimoe_text.py.
        return True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; frozen towers come back frozen, which loading alone does not preserve."""
        if is_torchao_available():
            # torchao then knows it by its name, in arguments and in folders.
            from .packed_int4_unimoe import PackedInt4Tensor  # noqa: F401
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.freeze_towers()  # type: ignore[operator]
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code goes along, so that the folder loads where unimoe is not installed.

        A class that is not in `AUTO_MAP`, such as somebody's subclass, is saved without code.
        """
        cls = type(self)
        own = [name for name, where in AUTO_MAP.items() if where.endswith(f".{cls.__name__}")]
        if not own:
            if cls._auto_class is None:
                self.config.__dict__.pop("auto_map", None)  # it would name files that are not there
            return super().save_pretrained(*args, **kwargs)
        self.config.auto_map = dict(AUTO_MAP)
        before = cls._auto_class
        cls._auto_class = own[0]  # type: ignore[assignment]
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            cls._auto_class = before

    def post_init(self) -> None:
        """As in transformers, once the experts are as bitsandbytes wants them, where it is asked for."""
        decoder = getattr(self, "language_model", None)
        if decoder is not None and wants_linear_experts(self.config):
            use_linear_experts(decoder)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_connector_weights(module, self.config.text_config.initializer_range)
        init_moai_weights(module)


def _input_modalities(config: UniMoeConfig) -> tuple[str, ...]:
    """What this very model takes, in the words of transformers.

    Its one reader there, the any-to-any pipeline, refuses to start without torchvision where images are named. Ours
    need none, nor do text and audio: without torchvision they stay unnamed, and the pipeline takes all of them.
    """
    sees = (config.image_connector is not None or config.video_connector is not None) and is_torchvision_available()
    hears = config.speech_connector is not None or config.sound_connector is not None
    return (("image", "video") if sees else ()) + (("audio",) if hears else ()) + ("text",)


__all__ = ["UniMoePreTrainedModel"]
