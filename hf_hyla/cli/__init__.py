"""The `hyla` command. Each command imports what it needs; bad input ends with one sentence and exit code 2."""

import argparse
import re
import sys

from . import runs, tools


def parse(argv: list[str]) -> argparse.Namespace:
    """
    The arguments of a command; `run` is its function, and `overrides` its `--section.key value` by key.

    Raises:
        ValueError: for an unknown argument. argparse exits by itself for a missing one.
    """
    parser = argparse.ArgumentParser(prog="hyla", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        runs.add_train,
        runs.add_evaluate,
        tools.add_probe,
        runs.add_compare,
        runs.add_sweep,
        tools.add_data,
        tools.add_ceiling,
        tools.add_bench,
        tools.add_card,
        tools.add_publish,
        tools.add_convert,
        tools.add_env,
    ):
        add(commands)
    rest, overrides = _split_overrides(argv)
    arguments, unknown = parser.parse_known_args(rest)
    accepted = getattr(arguments, "sections", ())
    unknown += [f"--{key}" for key in overrides if key.partition(".")[0] not in accepted]
    if unknown:
        expected = " or ".join(f"--{section}.key value" for section in accepted)
        raise ValueError(
            f"Unknown argument {unknown[0]!r}" + (f": expected {expected}." if expected else "; see --help.")
        )
    arguments.overrides = overrides
    return arguments


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return arguments.run(arguments) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hyla: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hyla: interrupted", file=sys.stderr)
        return 130


def _split_overrides(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--section.key value` and `--section.key=value` out of the words, wherever they stand."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    left = iter(words)
    for word in left:
        key, has_value, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"--\w+\.[\w.]+", "--" + key) or not word.startswith("--"):
            rest.append(word)
            continue
        overrides[key] = value if has_value else next(left, "")
        if not overrides[key]:
            raise ValueError(f"--{key} lacks a value: write --{key} VALUE.")
    return rest, overrides
