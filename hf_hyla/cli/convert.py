"""`hyla convert`: a checkpoint from the official implementation's parameters."""

import argparse
from pathlib import Path

from ..paths import find_file
from .parser import whole


def add(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn the official implementation's parameters into a checkpoint",
        description="Turns the official JAX implementation's parameters into a folder that from_pretrained loads.",
    )
    parser.add_argument("--params", required=True, help="safetensors file with tensors named params.<path>")
    parser.add_argument("--config", required=True, help="JSON file with the official config and loss_fn")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--num-answers",
        type=whole(at_least=1),
        help="number of last tokens that carry an answer (default: 4 on SRAVEN, 1 on logic)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    params = find_file(arguments.params, "file of parameters")
    config = find_file(arguments.config, "file with the official config")

    from ..convert import convert_files

    convert_files(params, config, arguments.output, arguments.num_answers)
    print(f"Wrote {arguments.output}")
