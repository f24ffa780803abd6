"""From plain YAML values to dataclasses, with errors that name the field, its value and what is allowed."""

import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...errors import RecipeError


def require(condition: bool, where: str, value: Any, allowed: str) -> None:
    """Raise RecipeError unless the condition holds."""
    if not condition:
        raise RecipeError(f"{where} is {value!r}; it must be {allowed}.")


def require_range(where: str, value: float, low: float, high: float) -> None:
    require(low <= value <= high, where, value, f"between {low} and {high}")


def require_choice(where: str, value: Any, choices: Sequence[str]) -> None:
    require(value in choices, where, value, f"one of {', '.join(map(repr, choices))}")


def build(cls: type, data: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping.

    Args:
        where: path of the mapping inside the recipe, for messages; "" at the top.

    Raises:
        RecipeError: unknown or missing field, or a value of the wrong type.
    """
    require(isinstance(data, dict), where or "the recipe", data, f"a mapping with fields of {cls.__name__}")
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in hints:
            close = get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{prefix}{key} is {data[key]!r}, but {cls.__name__} has no such field.{hint}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    for name in missing:
        if name not in data:
            raise RecipeError(f"{prefix}{name} is missing: {cls.__name__} needs it ({_describe(hints[name])}).")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, hint)
    if origin is Literal:
        require_choice(where, value, arguments)
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin is list:
        require(isinstance(value, list | tuple), where, value, _describe(hint))
        return [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        require(isinstance(value, dict), where, value, _describe(hint))
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and _is_number(value):
        return float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(fits, where, value, _describe(hint))
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str, hint: Any) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        plain = get_origin(option) or option
        if plain is Literal and value in get_args(option):
            return value
        if option is float and _is_number(value):
            return float(value)
        if is_dataclass(option) and isinstance(option, type) and isinstance(value, dict):
            return build(option, value, where)
        if plain in (list, dict, str, int) and isinstance(value, plain) and not isinstance(value, bool):
            return _convert(option, value, where)
    raise RecipeError(f"{where} is {value!r}; it must be {_describe(hint)}.")


def _is_number(value: Any) -> bool:
    # YAML 1.1 reads "1e-4" (no dot) as text; a number written like that is meant as one.
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is list:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping from names to {_describe(arguments[1])}"
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "nothing"}
    return names.get(hint, f"fields of {getattr(hint, '__name__', hint)}")
