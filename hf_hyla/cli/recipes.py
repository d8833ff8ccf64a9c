"""`hyla recipes`: lists and copies the recipes that come with the package."""

import argparse
import shutil
from pathlib import Path

from ..paths import find_existing, find_recipe
from ..utils import recipes_folder


def add(commands) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list or copy the recipes that come with the package",
        description="Lists the recipes, sweeps and launcher settings that come with the package, each with the hardware and "
        "time that it takes. Every command finds them by these names. With --output, they are copied into a folder, where "
        "you can change them and where accelerate launch --config_file finds its files.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="recipes, or folders of them (default: all)")
    parser.add_argument("--output", type=Path, help="folder to copy into, such as recipes; nothing is overwritten")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    top = recipes_folder()
    files = []
    for chosen in [_chosen(name) for name in arguments.names] or [top]:
        files += sorted(chosen.rglob("*")) if chosen.is_dir() else [chosen]
    files = [file for file in dict.fromkeys(files) if file.is_file() and "__pycache__" not in file.parts]
    if arguments.output:
        _copy(files, top, arguments.output)
        print(f"Copied {len(files)} files into {arguments.output}")
        return
    listed = {str(file.relative_to(top)): _about(file) for file in files if file.suffix == ".yaml"}
    width = max(map(len, listed), default=0)
    for name, about in listed.items():
        print(f"{name:<{width}}  {about}".rstrip())


def _chosen(name: str) -> Path:
    """The file or folder with this name among the recipes that come with the package."""
    top = recipes_folder()
    folder = top / name.removeprefix("recipes/")
    found = folder if folder.is_dir() else find_existing(folder, "recipe") if folder.exists() else find_recipe(name)
    if not found.resolve().is_relative_to(top.resolve()):
        raise ValueError(f"{name} does not come with the package: `hyla recipes` lists what does.")
    return found


def _copy(files: list[Path], top: Path, output: Path) -> None:
    targets = {file: output / file.relative_to(top) for file in files}
    for file, target in targets.items():  # all are checked before the first is written
        if target.exists() and target.read_bytes() != file.read_bytes():
            raise FileExistsError(f"{target} has been changed: choose another --output, or remove it.")
    for file, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.tmp")  # half a file would be taken for a changed one
        shutil.copyfile(file, unfinished)
        unfinished.replace(target)


def _about(file: Path) -> str:
    """The comment in a recipe's first line, which names hardware and time."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
