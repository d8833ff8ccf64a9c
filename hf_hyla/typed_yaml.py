"""YAML files of keys and values, each value in the type of a dataclass's field."""

import contextlib
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .reading import parse_yaml, read_yaml
from .utils import nearest, one_line


# Types that YAML has itself. Values for fields of other types are checked by their receiver.
_PLAIN = {int: "int", float: "float", bool: "bool", str: "str", types.NoneType: "null", list[str]: "list of str"}
_WORDS = {"yes": True, "on": True, "no": False, "off": False}

# Keys by which a file shows that it belongs to another command.
_KINDS = {"task": "a recipe: give it to `hyla train`", "base": "a sweep: give it to `hyla sweep`"}


def read_mapping(path: Path, what: str, keys: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """
    The content of a YAML file with these keys, of which the `optional` ones may be missing. `what` is the word for a key
    in error messages.

    Raises:
        ValueError: if it is not YAML, or has other keys, or one of them twice.
        OSError: if it cannot be read.
    """
    expected = ", ".join(keys)
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold the {what}s {expected}, got {type(content).__name__}.")
    for name, kind in _KINDS.items():
        if name in content and name not in keys:
            raise ValueError(f"{path} is {kind}.")
    for name in content:
        if name not in keys:
            raise ValueError(f"{path} has an unknown {what} {name!r}{nearest(str(name), keys)}: expected {expected}.")
    for name in keys:
        if name not in content and name not in optional:
            but = f", of which only {' and '.join(optional)} may be missing" if optional else ""
            raise ValueError(f"{path} lacks the {what} {name!r}: expected {expected}{but}.")
    return content


class Argument(str):
    """The text of a command's argument. `in_type` reads it, since its meaning depends on the type that its setting has."""

    def read(self, where: str, options: Collection[Any]) -> Any:
        """
        The value: text as it stands for a setting that takes text, unless it is null, in quotes or a list that the setting takes
        too; YAML for any other setting.

        Raises:
            ValueError: if it is neither text that the setting takes nor YAML. The message names the value by `where`.
        """
        try:
            value = parse_yaml(self)
        except ValueError:
            if str in options:
                return str(self)
            raise ValueError(f"{where} is not valid YAML: {str(self)!r:.200}.") from None
        is_quoted = isinstance(value, str) and self.lstrip().startswith(("'", '"'))
        is_list = isinstance(value, list) and list[str] in options
        return value if str not in options or value is None or is_quoted or is_list else str(self)


def in_types(
    where: str,
    section: dict[str, Any],
    schema: type,
    refused: dict[str, str] | None = None,
    also: dict[str, type] | None = None,
) -> dict[str, Any]:
    """
    The section's values in the types of the dataclass `schema`; unknown keys fail with the nearest name.

    `refused` maps keys that are not allowed to the reason; `also` adds keys that the schema does not declare.

    Raises:
        ValueError: for an unknown or refused key or a value of another type. The message names the section by `where`.
    """
    refused = refused or {}
    known = field_types(schema) | (also or {})
    allowed = [name for name in known if name not in refused]
    checked = {}
    for name, value in section.items():
        if name in refused:
            raise ValueError(f"{where} has the key {name!r}, which {refused[name]}; remove it.")
        if name not in known:
            hint = nearest(str(name), allowed) or (f": expected {', '.join(allowed)}" if len(allowed) < 12 else "")
            raise ValueError(f"{where} has no key {name!r}{hint}.")
        checked[name] = in_type(f"{where}.{name}", value, known[name])
    return checked


def field_types(schema: type) -> dict[str, Any]:
    """
    The annotations of a dataclass's fields, also where its module writes them as text (`from __future__ import annotations`). A
    text that names something unknown there, such as a class imported for type checkers only, stays text.
    """
    annotations = {field.name: field.type for field in dataclasses.fields(schema) if field.init}
    for name, annotation in annotations.items():
        if isinstance(annotation, str):
            owner = next(cls for cls in schema.__mro__ if name in vars(cls).get("__annotations__", {}))
            one = types.SimpleNamespace(__annotations__={name: annotation})
            with contextlib.suppress(NameError):
                annotations[name] = typing.get_type_hints(one, vars(sys.modules[owner.__module__]))[name]
    return annotations


def in_type(where: str, value: Any, annotation: Any) -> Any:
    """
    `value` in a type of the annotation: 1 becomes a float for a float, and yes becomes true for a bool. An `Argument` is read.

    Raises:
        ValueError: if it is of none of them, or not finite. The message names the value by `where`.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    if isinstance(value, Argument):
        value = value.read(where, options)
    literals = [option for option in options if typing.get_origin(option) is typing.Literal]
    if names := [name for literal in literals for name in typing.get_args(literal)]:
        return value if value is None and types.NoneType in options else one_of(where, value, names)
    if not set(options) <= set(_PLAIN):
        return value
    if float in options and type(value) in {int, str} - set(options):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if bool in options and str not in options and isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}.")
    is_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if (list[str] if is_texts else type(value)) in options:
        return value
    expected = " or ".join(sorted(_PLAIN[option] for option in options))
    raise ValueError(f"{where} must be {expected}, got {value!r:.200}.")


def one_of(where: str, value: Any, names: Collection[Any]) -> Any:
    """
    Raises:
        ValueError: unless the value is one of these names or numbers, with the nearest.
    """
    if value not in names or isinstance(value, bool):
        known = [str(name) for name in names]
        raise ValueError(f"{where} must be one of {', '.join(known)}, got {value!r:.200}{nearest(str(value), known)}.")
    return value
