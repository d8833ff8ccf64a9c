"""Reads files that somebody else may have written: only regular files of limited size and depth, and no code is run."""

import json
import re
from pathlib import Path
from typing import Any

import yaml


# Enough for a curve of half a million entries in JSON, and for a hundred recipes in YAML, whose parser is slow.
_MAX_JSON_BYTES, _MAX_YAML_BYTES = 50_000_000, 100_000
_MAX_LEVELS = 50


class _Loader(yaml.SafeLoader):
    """
    Refuses keys that occur twice, of which PyYAML silently takes the second, aliases, by which a few lines can stand for gigabytes,
    and tags such as !!set, which name types that no setting has. Words without quotes that PyYAML takes for something else (no for
    false, 010 for 8, 1:30 for 90) are text.
    """

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{alias.anchor} is not read, write its value out", alias.start_mark
            )
        node = self.peek_event()
        if node.tag is not None:
            raise yaml.composer.ComposerError(
                None, None, f"the tag {node.tag} is not read, leave it out", node.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                twice = f"the key {key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# Whatever is not text here is not text to PyYAML either, so PyYAML quotes text that looks like it.
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"(\.[0-9]+|[-+]?(0|[1-9][0-9_]*)\.[0-9]*)([eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), list(_first))


def read_text(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> str:
    """
    The text of a file.

    Raises:
        OSError: if it does not exist or may not be read.
        ValueError: if it is not a regular file, too large, or not UTF-8. Here and below, the message does not name the file:
            the caller adds the name.
    """
    path.stat()  # raises if it does not exist
    if not path.is_file():  # a pipe would be waited for, and a device may have no end
        raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes:,} bytes")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """
    The content of a JSON file.

    Raises:
        OSError, ValueError: as `read_text` does, and if it is not JSON, has a key twice, or is nested too deep.
    """
    try:
        content = json.loads(read_text(path), object_pairs_hook=_once)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(content)
    return content


def read_yaml(path: Path) -> Any:
    """
    The content of a YAML file.

    Raises:
        OSError, ValueError: as `read_text` and `parse_yaml` do.
    """
    return parse_yaml(read_text(path, _MAX_YAML_BYTES))


def parse_yaml(text: str) -> Any:
    """
    The content of YAML text.

    Raises:
        ValueError: if it is not YAML, has a key twice or an alias, or is nested too deep.
    """
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(content)
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; json would silently take the second of two values."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r:.80} occurs twice")
        content[key] = value
    return content


def _check_depth(content: Any) -> None:
    """
    Refuses what is nested so deep that Python's recursive functions could not compare, print or write it.

    Raises:
        ValueError: if it is nested too deep.
    """
    level = [content]
    for _ in range(_MAX_LEVELS):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        if not inner:
            return
        level = [value for values in inner for value in values]
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {_MAX_LEVELS} levels")
