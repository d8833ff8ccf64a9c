"""`hyla demo`: a page for trying models."""

import argparse
import importlib.util

from ..paths import find_model
from ..utils import DEMO_MODELS
from .parser import whole


def add(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="open a page for trying models",
        description="Opens a page on this machine for trying models: a board of SRAVEN puzzles with answers, probabilities and "
        "latent codes side by side, and fuzzy logic functions. Nothing is sent anywhere else. Without MODEL it shows those that "
        f"come with the package: {', '.join(DEMO_MODELS)}.",
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help="folders of runs, or Hub repositories to which runs were published"
    )
    parser.add_argument(
        "--port",
        type=whole(at_least=1, at_most=65_535),
        help="port to listen on (default: the first free one from 7860)",
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address, and open no browser")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    models = [find_model(word) for word in arguments.models or DEMO_MODELS]
    for module, package in (("gradio", "gradio"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"The demo needs {package}, which is not installed: pip install hf-hyla[demo].")
    print("Loading the models, and fitting a probe for each SRAVEN model ...", flush=True)

    from transformers.utils.logging import disable_progress_bar

    from ..demo.app import LAUNCH, page

    disable_progress_bar()
    demo = page(models)
    _, address, _ = demo.launch(
        server_port=arguments.port, inbrowser=not arguments.no_browser, quiet=True, prevent_thread_lock=True, **LAUNCH
    )
    print(f"The demo is at {address} until you press Ctrl+C.", flush=True)
    demo.block_thread()
