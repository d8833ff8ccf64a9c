"""
HYLA, hypernetwork linear attention, for Hugging Face transformers. Importing this package registers the Auto classes
and the pipeline.

transformers and torch take seconds to import, and `hyla --help` needs neither. So the classes are loaded when they are first
used, or when transformers is imported:

- If transformers has already been imported, `hf_hyla.model` is imported at once and registers its classes.
- Otherwise an import hook imports `hf_hyla.model` right after transformers.
"""

import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .model import (
        HylaAttention,
        HylaConfig,
        HylaForCausalLM,
        HylaForSequenceClassification,
        HylaModel,
        HylaRotaryEmbedding,
        SymbolicReasoningPipeline,
        eager_attention_forward,
    )

__version__ = "0.2.0"
__all__ = [
    "HylaAttention",
    "HylaConfig",
    "HylaForCausalLM",
    "HylaForSequenceClassification",
    "HylaModel",
    "HylaRotaryEmbedding",
    "SymbolicReasoningPipeline",
    "__version__",
    "eager_attention_forward",
]


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Finds transformers by the other finders, and imports `hf_hyla.model` after it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                # If `hf_hyla.model` is being imported already, perhaps in another thread, waiting for it could deadlock.
                if "hf_hyla.model" not in sys.modules:
                    importlib.import_module("hf_hyla.model")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    importlib.import_module("hf_hyla.model")
else:
    sys.meta_path.insert(0, _AfterTransformers())


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("hf_hyla.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
