"""Makes transformers' Auto classes know ours, without importing the model code until it is needed."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from .modeling_unimoe.configuration_unimoe import UniMoeConfig, UniMoeTextConfig
from .modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig


class LazyClass:
    """Stands in for a class in an Auto mapping and becomes it at the first use of any attribute."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def resolve(self) -> type:
        return getattr(import_module(self._module, __package__), self._name)

    def __getattr__(self, attribute: str) -> Any:
        return self._name if attribute == "__name__" else getattr(self.resolve(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolve()(*args, **kwargs)


class AfterImport(MetaPathFinder):
    """Runs a callback right after one module has been imported, if it ever is."""

    def __init__(self, module: str, callback: Callable[[ModuleType], None]) -> None:
        self._module, self._callback = module, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run_module(module)
                self._callback(module)

            spec.loader.exec_module = exec_module
        return spec


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> None:
    """Call back with the module now if it is loaded, else as soon as it is."""
    if module in sys.modules:
        callback(sys.modules[module])
    else:
        sys.meta_path.insert(0, AfterImport(module, callback))


def register_auto_classes() -> None:
    """Register configurations, models and processor. Calling it again changes nothing."""
    for config_class in (UniMoeConfig, UniMoeTextConfig, UniMoeBeatsConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

    causal_lm = LazyClass(".modeling_unimoe.modeling_unimoe", "UniMoeForCausalLM")
    model = LazyClass(".modeling_unimoe.modeling_unimoe", "UniMoeModel")
    text_model = LazyClass(".modeling_unimoe.modeling_unimoe_text", "UniMoeTextModel")
    beats = LazyClass(".modeling_unimoe.modeling_unimoe_beats", "UniMoeBeatsModel")
    # The mappings' own register(): the Auto classes' would look at the class and so import it.
    modeling_auto.MODEL_MAPPING.register(UniMoeConfig, model, exist_ok=True)
    modeling_auto.MODEL_MAPPING.register(UniMoeTextConfig, text_model, exist_ok=True)
    modeling_auto.MODEL_MAPPING.register(UniMoeBeatsConfig, beats, exist_ok=True)
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ):
        mapping.register(UniMoeConfig, causal_lm, exist_ok=True)
    # transformers' processor module imports every audio and video library that is installed: leave it to its user.
    when_imported("transformers.models.auto.processing_auto", _register_processor)


def _register_processor(processing_auto: ModuleType) -> None:
    processor = LazyClass(".processing.processing_unimoe", "UniMoeProcessor")
    processing_auto.PROCESSOR_MAPPING.register(UniMoeConfig, processor, exist_ok=True)
