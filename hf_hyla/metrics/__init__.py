"""The paper's metrics: plain functions, and `evaluate.Metric` classes around them."""

from typing import TYPE_CHECKING, Any

from .functions import base_mse, logic_r2, perplexity, sraven_accuracy


if TYPE_CHECKING:
    from .modules import LogicR2, Perplexity, SravenAccuracy


def __getattr__(name: str) -> Any:
    # Loaded on demand, since evaluate and datasets are slow to import and training does not need them.
    if name in ("LogicR2", "Perplexity", "SravenAccuracy"):
        from . import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["LogicR2", "Perplexity", "SravenAccuracy", "base_mse", "logic_r2", "perplexity", "sraven_accuracy"]
