"""The next token of documents, byte by byte or by a tokenizer."""

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from ...metrics.functions import perplexity
from ..base import Task, TaskDataset
from ..sampling import draw_words, stream_key
from ..words import Words
from .documents import read_documents
from .tokens import BYTES, Tokens, load_tokenizer
from .words import TextWords


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_MAX_SEQUENCE_LENGTH = 1_000_000


@strict
@dataclasses.dataclass
class TextTask(Task):
    """
    The next token of documents.

    A sample is a row of `sequence_length` tokens of a single document, see `Tokens`. The rest of a document's last row is
    padding. Training goes through all rows in an order that is drawn anew for every epoch, from `seed`. So sample i is a
    function of the documents, the settings, the split and i.

    Without `files` and `dataset_name`, the documents are the Python sources of the running interpreter's standard library, without
    its tests. Interpreters differ in them, and the fingerprint tells them apart.

    Args:
        files (`str`, *optional*):
            A file, a folder, of which all files but hidden ones are read, or a pattern such as `"texts/**/*.txt"`. Each file is
            one document, in UTF-8.
        dataset_name (`str`, *optional*):
            A dataset on the Hub or a local folder, as `datasets.load_dataset` takes it. Each row is one document.
        dataset_config_name (`str`, *optional*):
            The configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The rows to train on, such as `"train[:1%]"`.
        dataset_test_split (`str`, *optional*):
            The rows of the split `test`; without it they are held out of `dataset_split`.
        text_column (`str`, *optional*, defaults to `"text"`):
            The column of the dataset that holds the text.
        held_out (`float`, *optional*, defaults to 0.05):
            The share of documents that is held out as `test`, by a hash of the file's path relative to the folder or of the
            row's text, see `is_held_out`. It does not depend on the seed.
        tokenizer (`str`, *optional*, defaults to `"bytes"`):
            `"bytes"`, or a tokenizer's folder or repository.
        sequence_length (`int`, *optional*, defaults to 256):
            Tokens of a row.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order of rows in training.
    """

    name: ClassVar[str] = "text"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    splits: ClassVar[dict[str, str]] = {
        "train": "rows of the documents for training",
        "test": "documents that were held out",
    }
    headline_split: ClassVar[str] = "test"
    model_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "num_bytes")
    label_columns: ClassVar[tuple[str, ...]] = ("labels", "num_bytes")
    metric_names: ClassVar[tuple[str, ...]] = ("bits_per_byte", "perplexity")
    greater_is_better: ClassVar[bool] = False
    eval_batch_size: ClassVar[int] = 32
    words: ClassVar[type[Words]] = TextWords

    files: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    dataset_test_split: str | None = None
    text_column: str = "text"
    held_out: float | int = 0.05
    tokenizer: str = BYTES
    sequence_length: int = 256
    reference_split: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.files is not None and self.dataset_name is not None:
            raise ValueError(
                f"files={self.files!r} and dataset_name={self.dataset_name!r} both say where documents come from: leave one out."
            )
        of_dataset = {
            "dataset_config_name": None,
            "dataset_split": "train",
            "dataset_test_split": None,
            "text_column": "text",
        }
        for setting, default in of_dataset.items():
            if self.dataset_name is None and getattr(self, setting) != default:
                raise ValueError(
                    f"{setting} belongs to a dataset_name, which is missing: add it, or leave {setting} out."
                )
        if self.dataset_test_split is not None and self.held_out != type(self).held_out:
            raise ValueError(
                f"held_out={self.held_out} has no effect, since dataset_test_split names the documents that are held out: leave one "
                "out."
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        if not 2 <= self.sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ValueError(f"sequence_length must be 2 to {_MAX_SEQUENCE_LENGTH}, got {self.sequence_length}.")
        if self.reference_split:
            raise ValueError(
                "reference_split belongs to tasks with combinations of parts, and text has none: leave it out."
            )

    @functools.cached_property
    def processing_class(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.tokenizer)

    @functools.cached_property
    def tokens(self) -> dict[str, Tokens]:
        """
        The documents of each split as tokens and rows; read on first use, and kept in memory.

        Raises:
            ValueError, OSError: see `read_documents`.
        """
        documents = read_documents(
            files=self.files,
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            dataset_split=self.dataset_split,
            dataset_test_split=self.dataset_test_split,
            text_column=self.text_column,
            held_out=self.held_out,
        )
        return {
            split: Tokens.of(texts, self.processing_class, self.tokenizer, self.sequence_length)
            for split, texts in documents.items()
        }

    @property
    def num_samples(self) -> dict[str, int]:
        """Rows per split."""
        return {split: len(tokens.starts) for split, tokens in self.tokens.items()}

    @property
    def model_interface(self) -> dict[str, Any]:
        vocab_size = len(self.processing_class)
        return {"vocab_size": vocab_size, "is_causal": True, "answer_token_id": None, "embedding_bias": False}

    @property
    def model_defaults(self) -> dict[str, Any]:
        """The paper's language model with rotary positions, made smaller: about ten million parameters for bytes."""
        end = self.processing_class.eos_token_id
        return self.model_interface | {
            "bos_token_id": end,
            "eos_token_id": end,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "head_dim": None,
            "value_head_dim": None,
            "ffn_type": "swiglu",
            "intermediate_size": 1024,
            "position_type": "rotary",
            "max_position_embeddings": self.sequence_length,
            "attention_dropout": 0.0,
        }

    @property
    def split_combinations(self) -> dict[str, np.ndarray]:
        raise ValueError(
            "The task text has no combinations of parts, so its codes are not probed and its scores are not split by "
            "combination: choose another task."
        )

    def features(self) -> "datasets.Features":
        raise ValueError(
            "The task text reads documents that already exist, so it is not written as a dataset: name them by files or "
            "dataset_name."
        )

    def dataset(self, split: str, num_samples: int | None = None) -> TaskDataset:
        """As for other tasks, but no row is scored twice: splits other than `train` have at most as many samples as rows."""
        self._check_split(split)
        rows = self.num_samples[split]
        return super().dataset(
            split, num_samples if split == "train" or num_samples is None else min(num_samples, rows)
        )

    def draw(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        tokens, num_rows = self.tokens[split], self.num_samples[split]
        epochs, places = np.divmod(indices, num_rows)
        if split == "train":
            for epoch in np.unique(epochs):
                of_epoch = epochs == epoch
                places[of_epoch] = self._order(int(epoch))[places[of_epoch]]
        return tokens.rows(places, self.sequence_length, padding=self.processing_class.eos_token_id)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of all training rows in an epoch."""
        last = self.__dict__.get("_last_order")
        if last is None or last[0] != epoch:
            key = stream_key(self.name, self.seed, "order of train")
            words = draw_words(key, np.array([epoch]), self.num_samples["train"])[0]
            last = self.__dict__["_last_order"] = (epoch, np.argsort(words, kind="stable"))
        return last[1]

    def fingerprint(self) -> str:
        """
        A digest of all documents as tokens, and of the seed and the length of the rows: two machines whose documents differ in a
        byte have different fingerprints.
        """
        digest = hashlib.sha256(f"{self.seed} {self.sequence_length}\n".encode())
        for split, tokens in self.tokens.items():
            digest.update(f"{split} {len(tokens.ids)}\n".encode())
            digest.update(tokens.ids.astype("<u4").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def predictions(self, logits: torch.Tensor, labels: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The log-likelihood (samples, tokens - 1) of every token but the first; 0 where no token is to be predicted."""
        labels = labels[0] if isinstance(labels, tuple) else labels
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none"
        )
        return -losses.view(len(labels), -1)

    def metrics(self, logits: np.ndarray, labels: Any, inputs: np.ndarray) -> dict[str, float]:
        """
        Args:
            logits: what `predictions` returns.
            labels: the columns `labels` and `num_bytes`.

        Returns:
            `bits_per_byte`, if the tokens stand for any bytes, `perplexity` and `loss`, see `hf_hyla.metrics.perplexity`.
        """
        tokens, num_bytes = (column[:, 1:] for column in labels)
        predicted = tokens != -100
        log_likelihoods = logits[predicted].astype(np.float64)
        loss = -float(log_likelihoods.mean())
        if not num_bytes[predicted].any():
            return {"loss": loss, "perplexity": float(np.exp(loss))}
        return {"loss": loss, **perplexity(log_likelihoods, num_bytes[predicted])}

    def show(self, sample: dict[str, np.ndarray]) -> str:
        is_token = (sample["labels"] != -100) | (np.arange(len(sample["labels"])) == 0)
        return str(self.processing_class.decode(sample["input_ids"][is_token]))
