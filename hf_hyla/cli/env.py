"""`hyla env`: versions and hardware."""

import argparse
import json


def add(commands) -> None:
    parser = commands.add_parser(
        "env", help="print versions and hardware", description="Prints versions and hardware as JSON."
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ..runs.environment import environment, hardware

    print(json.dumps({"environment": environment(), "hardware": hardware()}, indent=2))
