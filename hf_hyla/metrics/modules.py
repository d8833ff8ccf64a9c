"""The metrics as `evaluate.Metric` classes, which need no network."""

import datasets
import evaluate
import numpy as np

from . import functions


_CITATION = """\
@inproceedings{schug2025attention,
  title={Attention as a Hypernetwork},
  author={Schug, Simon and Kobayashi, Seijin and Akram, Yassir and Sacramento, Jo{\\~a}o and Pascanu, Razvan},
  booktitle={International Conference on Learning Representations},
  year={2025},
  url={https://arxiv.org/abs/2406.05816}
}"""


class SravenAccuracy(evaluate.Metric):
    """
    `SravenAccuracy().compute(predictions=..., references=...)` with the answers (puzzles, features) as integers gives
    `accuracy` (all features right) and `feature_accuracy`.
    """

    def _info(self) -> evaluate.MetricInfo:
        answers = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Fraction of SRAVEN puzzles whose answer is right in every feature, and fraction of right features.",
            citation=_CITATION,
            inputs_description="predictions, references: lists of answers, each a list of integers, one per feature.",
            features=datasets.Features({"predictions": answers, "references": answers}),
            reference_urls=["https://arxiv.org/abs/2406.05816"],
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return functions.sraven_accuracy(np.array(predictions), np.array(references))


class Perplexity(evaluate.Metric):
    """
    `Perplexity().compute(log_likelihoods=..., num_bytes=...)` with one number per token gives `perplexity` and
    `bits_per_byte`. Unlike the metric of this name on the Hub it loads no model: the likelihoods may be of any.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity per token of a text, and bits per byte, from the likelihoods that a model gave.",
            citation=_CITATION,
            inputs_description="log_likelihoods: natural logarithms, one per token. num_bytes: the bytes that each stands for.",
            features=datasets.Features(
                {"log_likelihoods": datasets.Value("float64"), "num_bytes": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2406.05816"],
        )

    def _compute(self, log_likelihoods, num_bytes) -> dict[str, float]:
        return functions.perplexity(np.array(log_likelihoods), np.array(num_bytes))


class LogicR2(evaluate.Metric):
    """
    `LogicR2().compute(predictions=..., references=..., base_mse=...)` with one number per sample gives `r2`, the mean of
    1 - squared error / base_mse.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Mean over fuzzy-logic samples of 1 - squared error / variance of the sample's values.",
            citation=_CITATION,
            inputs_description="predictions, references, base_mse: one number per sample.",
            features=datasets.Features({"predictions": number, "references": number, "base_mse": number}),
            reference_urls=["https://arxiv.org/abs/2406.05816"],
        )

    def _compute(self, predictions, references, base_mse) -> dict[str, float]:
        return functions.logic_r2(np.array(predictions), np.array(references), np.array(base_mse))
