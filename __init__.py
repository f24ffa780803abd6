"""unimoe: multimodal Mixture-of-Experts models of your own, native to Hugging Face transformers.

With this package imported, transformers' Auto classes know its classes, so that a saved folder loads without
`trust_remote_code`. The classes themselves are imported when they are first used: `import unimoe` stays light.
"""

from importlib import import_module
from typing import Any

from .registration import register_when_used

__version__ = "0.1.0"

_PUBLIC = {
    "UniMoeConfig": ".modeling_unimoe.configuration_unimoe",
    "UniMoeConnectorConfig": ".modeling_unimoe.configuration_unimoe",
    "UniMoeTextConfig": ".modeling_unimoe.configuration_unimoe_text",
    "UniMoeBeatsConfig": ".modeling_unimoe.configuration_unimoe_beats",
    "UniMoeModel": ".modeling_unimoe.modeling_unimoe",
    "UniMoeForCausalLM": ".modeling_unimoe.modeling_unimoe",
    "UniMoeTextModel": ".modeling_unimoe.modeling_unimoe_text",
    "UniMoeBeatsModel": ".modeling_unimoe.modeling_unimoe_beats",
    "UniMoeProcessor": ".processing.processing_unimoe",
    "UniMoeError": ".errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unimoe' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_when_used()
