"""
The `hyla` command. Bad input ends with one sentence and exit code 2.

A command is a file with two functions: `add` declares the arguments, and `run` imports what the command needs and executes it.
So `--help` and wrong arguments need no import of torch and transformers.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import sys

from .. import __version__
from ..utils import DISK_IS_FULL, nearest, printable
from . import bench, card, ceiling, compare, convert, data, demo, env, evaluate, probe, publish, recipes, sweep, train
from .parser import Parser
from .settings import check_settings, task_named, unknown_argument


COMMANDS = (train, evaluate, demo, probe, compare, sweep, recipes, data, ceiling, bench, card, publish, convert, env)


def parse(argv: list[str]) -> argparse.Namespace:
    """
    The parsed arguments of a command. `run` is the command's function, and `overrides` maps the key of each
    `--section.key value` to its value.

    Raises:
        ValueError: for a command or an argument that is missing, unknown or wrong.
    """
    parser = Parser(prog="hyla", description="HYLA: train, evaluate, analyse and publish.")
    parser.add_argument("--version", action="version", version=f"hyla {__version__}")
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module with a task of your own, which lets its runs be read",
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    parser.set_defaults(run=lambda arguments: parser.print_help(), sections=())
    for given, before in zip(argv, ["hyla", *argv], strict=False):
        option, equals, value = given.partition("=") if given.startswith("--") else ("", "", given)
        before = option if equals else before
        if not value.strip() and (equals or not option):
            raise ValueError(
                f"The argument after {before!r} is empty: give it a value or leave it out (is a variable unset?)."
            )
    rest, overrides = _split_overrides([_at_home(word) for word in argv])
    words = (word for word, before in zip(rest, ["", *rest], strict=False) if before != "--import")
    word = next((word for word in words if not word.startswith("-")), None)
    if word is not None and word not in commands.choices:
        known = ", ".join(commands.choices)
        raise ValueError(f"There is no command {word!r}{nearest(word, commands.choices)}: expected one of {known}.")
    arguments, unknown = parser.parse_known_args(rest)
    unknown += [f"--{key}" for key in overrides if key.partition(".")[0] not in arguments.sections]
    if unknown:
        chosen = commands.choices[word] if word else parser
        raise ValueError(unknown_argument(unknown[0], chosen.options, arguments.sections))
    check_settings(overrides, task_named(arguments, overrides))
    arguments.overrides = overrides
    return arguments


def main(argv: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # it was a file, and has been redirected meanwhile
            sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows ?, and no result is lost for it
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.modules:
            from ..tasks import import_module

            for module in arguments.modules:
                import_module(module)
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. Without this, Python would report the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hyla: {_said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hyla: interrupted", file=sys.stderr)
        return 130


def _said(error: Exception) -> str:
    """The error's message in one line, with advice in place of the number that errors of the system have."""
    said = str(error)
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        where = f" for {error.filename2 or error.filename}" if error.filename else ""
        said = (
            f"There is no space left{where}: free some, or name a folder on another disk, and give the command again."
        )
    elif isinstance(error, OSError) and error.errno and error.filename:
        advice = "check the path, or make or copy it again" if error.errno == errno.ENOENT else "choose another path"
        said = f"{error.filename} cannot be used ({error.strerror}): {advice}."
    return printable(" ".join(said.split()))


def _at_home(word: str) -> str:
    """The word with its leading `~` replaced, which shells do not replace behind a `=`, as in `--output=~/run`."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (os.path.expanduser(value) if "/" in value else value)  # a ~ alone is YAML's null


def _split_overrides(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--section.key value` and `--section.key=value`, anywhere among the words, from the other words."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    left = iter(words)
    for word in left:
        key, has_value, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"--\w+\.[\w.]+", "--" + key) or not word.startswith("--"):
            rest.append(word)
            continue
        overrides[key] = value if has_value else next(left, "")
        # No value begins with two dashes: what does is the next option.
        if not overrides[key] or (not has_value and overrides[key].startswith("--")):
            raise ValueError(f"--{key} lacks a value: write --{key} VALUE.")
    return rest, overrides
