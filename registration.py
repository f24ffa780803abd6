"""Makes transformers' Auto classes know ours, as soon as anybody uses them and not before.

`import unimoe` registers nothing yet and imports neither torch nor transformers, which keeps the command line quick.
Hooks run right after the modules concerned have been imported, by whomever.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_CONFIGURATION = ".modeling_unimoe.configuration_unimoe"
_TEXT_CONFIGURATION = ".modeling_unimoe.configuration_unimoe_text"
_BEATS_CONFIGURATION = ".modeling_unimoe.configuration_unimoe_beats"


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
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run_module(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._callback(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> None:
    """Call back with the module now if it is loaded, else as soon as it is."""
    if module in sys.modules:
        callback(sys.modules[module])
    else:
        sys.meta_path.insert(0, AfterImport(module, callback))


def register_when_used() -> None:
    """Make the Auto classes know ours, in two steps, each as soon as it can matter.

    The configurations are registered by name when transformers' own table of them is loaded; nothing of ours is
    imported then, as that table is loaded in the middle of other imports. The first use of a configuration imports it,
    and only from then on can anybody hold one and look for its model or processor.
    """
    when_imported("transformers.models.auto.configuration_auto", _register_names)
    when_imported(f"{__package__}{_BEATS_CONFIGURATION}", _register_beats)
    when_imported(f"{__package__}{_TEXT_CONFIGURATION}", _register_text)
    when_imported(f"{__package__}{_CONFIGURATION}", _register_models)


def _register_names(configuration_auto: ModuleType) -> None:
    for model_type, config_class in {
        "unimoe": LazyClass(_CONFIGURATION, "UniMoeConfig"),
        "unimoe_text": LazyClass(_TEXT_CONFIGURATION, "UniMoeTextConfig"),
        "unimoe_beats": LazyClass(_BEATS_CONFIGURATION, "UniMoeBeatsConfig"),
    }.items():
        configuration_auto.CONFIG_MAPPING.register(model_type, config_class, exist_ok=True)


def _register_beats(configuration: ModuleType) -> None:
    config_class = configuration.UniMoeBeatsConfig
    _register(config_class, LazyClass(".modeling_unimoe.modeling_unimoe_beats", "UniMoeBeatsModel"), ["MODEL_MAPPING"])


def _register_text(configuration: ModuleType) -> None:
    config_class = configuration.UniMoeTextConfig
    _register(config_class, LazyClass(".modeling_unimoe.modeling_unimoe_text", "UniMoeTextModel"), ["MODEL_MAPPING"])


def _register_models(configuration: ModuleType) -> None:
    config_class = configuration.UniMoeConfig
    _register(config_class, LazyClass(".modeling_unimoe.modeling_unimoe", "UniMoeModel"), ["MODEL_MAPPING"])
    _register(
        config_class,
        LazyClass(".modeling_unimoe.modeling_unimoe", "UniMoeForCausalLM"),
        [
            "MODEL_FOR_CAUSAL_LM_MAPPING",
            "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
            "MODEL_FOR_MULTIMODAL_LM_MAPPING",
        ],
    )
    # transformers' processor module imports every audio and video library that is installed: leave it to its user.
    when_imported(
        "transformers.models.auto.processing_auto",
        lambda processing_auto: processing_auto.PROCESSOR_MAPPING.register(
            config_class, LazyClass(".processing.processing_unimoe", "UniMoeProcessor"), exist_ok=True
        ),
    )


def _register(config_class: Any, model_class: LazyClass, mappings: Sequence[str]) -> None:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for mapping in mappings:
        # The mapping's own register(): the Auto class's would look at the model class and so import it.
        getattr(modeling_auto, mapping).register(config_class, model_class, exist_ok=True)
