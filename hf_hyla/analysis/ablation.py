"""Ablation of heads: the code of a head is replaced by its mean over samples, which says nothing about a sample."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..model.attention_hyla import generated_values, mixed_values
from .latents import Batch, code_hooks, run, watching


def mean_codes(model: nn.Module, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """
    The mean code of every pair over all samples, as one tensor (heads, query, key) per layer. Sums are in float64.

    Raises:
        ValueError: if there are no batches, or their sequences differ in length.
    """
    sums: dict[int, torch.Tensor] = {}
    count = 0

    def add(layer: int, codes: torch.Tensor) -> None:
        total = codes.sum(dim=0, dtype=torch.float64)
        if layer in sums and sums[layer].shape != total.shape:
            raise ValueError("Mean codes need sequences of one length: pad them, or pass batches of one length.")
        sums[layer] = sums[layer] + total if layer in sums else total

    with watching(model, add):
        for batch in batches:
            run(model, batch)
            count += len(next(iter(batch.values())))
    if not count:
        raise ValueError("There are no mean codes: the batches hold no samples.")
    return [sums[layer] / count for layer in sorted(sums)]


@contextmanager
def ablated(model: nn.Module, layer: int, heads: list[int], mean: torch.Tensor) -> Iterator[None]:
    """
    Within the context, these heads of a layer use the code `mean` (heads, query, key) for every sample. In HYLA, both layers of
    the value network use it. Other layers are not changed.

    Raises:
        IndexError: if there is no such layer or head.
    """

    def replace(module, args, kwargs, output):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        codes = output[1].clone()
        codes[:, heads] = mean[heads].to(codes)
        value = module.v_proj(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        if module.attention_type == "hyla":
            mixed = generated_values(codes, value, module.value_activation, module.value_mixing)
        else:
            mixed = mixed_values(codes, value, module.value_activation)
        return module.o_proj(mixed.transpose(1, 2).flatten(2)), codes

    with code_hooks(model, {layer: replace}):
        yield


def ablate_heads(
    model: nn.Module, means: list[torch.Tensor], score: Callable[[], np.ndarray | float], progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    Scores of the whole model, and of the model without each head.

    Args:
        means: mean codes from `mean_codes`. They may be of other samples than the score.
        score: computes a score (...) with this model.

    Returns:
        The whole model's score (...), and the scores (layers, heads, ...) of the model without one head.
    """
    whole = np.asarray(score())
    without = np.zeros((len(means), max(map(len, means)), *whole.shape))
    cases = [(layer, head) for layer, mean in enumerate(means) for head in range(len(mean))]
    for layer, head in tqdm(cases, desc="Ablating heads", disable=not progress):
        with ablated(model, layer, [head], means[layer]):
            without[layer, head] = score()
    return whole, without


def corrected_p_values(differences: np.ndarray, errors: np.ndarray, freedom: int) -> np.ndarray:
    """
    The p-values of differences by two-sided t-tests, with Holm's correction for the number of tests.

    Args:
        differences, errors: each head's difference and its standard error, arrays of one shape.
        freedom: degrees of freedom of the errors.
    """
    from scipy import stats  # which scikit-learn depends on

    with np.errstate(divide="ignore", invalid="ignore"):
        # 0 / 0 is no difference and no error, which is a distance of 0.
        distances = np.nan_to_num(np.abs(differences) / errors, nan=0, posinf=np.inf)
    p_values = 2 * stats.t.sf(distances, freedom).ravel()
    order = p_values.argsort()
    # The smallest is multiplied by the number of tests, the next by one less, and so on. None may be smaller than the one before.
    multiplied = p_values[order] * np.arange(p_values.size, 0, -1)
    p_values[order] = np.minimum(np.maximum.accumulate(multiplied), 1)
    return p_values.reshape(differences.shape)
