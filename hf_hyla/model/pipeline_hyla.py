# Copyright 2026 The hf_hyla authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The pipeline that takes SRAVEN puzzles or truth tables as lists and gives the model's answers."""

from collections.abc import Iterable
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .card_hyla import fill_in_card


logger = logging.get_logger(__name__)


GRID = 3
_SCALARS = {int, float, type(None)}


class SymbolicReasoningPipeline(Pipeline):
    """
    The pipeline `"symbolic-reasoning"`, for models with a classification head that answer the paper's tasks.

    A SRAVEN model, with `vocab_size` and `answer_token_id` in its config, takes puzzles. A puzzle is 3 rows of 3 panels,
    and a panel is a list of `num_answers` integers in 0 to `answer_token_id - 1`. The last panel is `None`. The 8 panels before
    it in one list, as in the column `panels` of a dataset by `hyla data`, are a puzzle too.

    A fuzzy logic model, with `input_size` in its config, takes truth tables. A table is 2 or more rows of `input_size`
    numbers in [0, 1]: a point, and the function's value there. The last value is `None`.

    Arrays and tensors are taken as lists are. One puzzle or table gives a dict. A list gives a list of dicts. An iterator, a
    dataset, or a column of a dataset gives an iterator over dicts. Each dict holds
    - `answer`: a list of `num_answers` integers for a puzzle, a number for a table;
    - `scores`: for a puzzle, the probability of each value, a list per feature;
    - `codes`: with `return_codes=True`, the latent codes of the answer tokens, a tensor (layers, heads, answers, keys).

    Raises:
        ValueError: if the model answers neither task, or a puzzle or table is not as described. Nothing is computed then.

    ```python
    >>> import hf_hyla
    >>> from transformers import pipeline

    >>> solve = pipeline("symbolic-reasoning", model="path/to/sraven-model")
    >>> solve([[[0, 1], [1, 1], [2, 1]], [[3, 5], [4, 5], [5, 5]], [[1, 0], [2, 0], None]])
    ```"""

    _load_tokenizer = _load_processor = _load_image_processor = _load_feature_extractor = False

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        fill_in_card(working_dir, repo_id, self.model.config, self.model)  # private, see HylaPreTrainedModel
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        self._is_sraven = getattr(config, "vocab_size", None) is not None
        self._num_values: int = config.num_labels
        if self._is_sraven:
            fits = getattr(config, "answer_token_id", None) == self._num_values
        else:
            fits = getattr(config, "input_size", None) is not None and (config.num_labels, config.num_answers) == (
                1,
                1,
            )
        if not fits or not hasattr(self.model, "classifier"):
            raise ValueError(
                f"The pipeline {self.task} needs a classification model of SRAVEN, whose num_labels is its "
                "answer_token_id, or of fuzzy logic, with input_size and one number as its answer, but this "
                f"{type(self.model).__name__} is neither."
            )
        self.model.eval()

    def _sanitize_parameters(self, return_codes: bool | None = None):
        return {}, {} if return_codes is None else {"return_codes": return_codes}, {}

    def __call__(self, inputs, **kwargs):
        inputs = _as_lists(inputs)
        if isinstance(inputs, list):
            # One puzzle or truth table is a list too.
            several = _are_nested(inputs, 4 if self._is_sraven else 3)
            if not several and not (self._is_sraven and inputs and all(map(_is_without_rows, inputs))):
                return super().__call__(self._encoded(inputs), **kwargs)
            # All are encoded first, so a bad one is refused before any work.
            inputs = [self._encoded_nth(number, item) for number, item in enumerate(inputs)]
        elif isinstance(inputs, Iterable) and not isinstance(inputs, (str, dict, Dataset, GeneratorType)):
            # A column of a dataset, or another iterator, which the base class would take for one input.
            inputs = (item for item in inputs)
        return super().__call__(inputs, **kwargs)

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        # As in the base class, which makes batches only with a tokenizer or a processor.
        dataset = PipelineDataset if hasattr(inputs, "__len__") else PipelineIterator
        if dataset is PipelineIterator and num_workers > 1:
            logger.warning("Each worker would read all of an iterator, so num_workers is set to 1.")
            num_workers = 1
        encoded = dataset(inputs, self.preprocess, preprocess_params)
        batches = DataLoader(encoded, num_workers=num_workers, batch_size=batch_size, collate_fn=_collate)
        outputs = PipelineIterator(batches, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def preprocess(self, inputs: Any) -> dict[str, torch.Tensor]:
        """The inputs of the model for one puzzle or truth table, as a batch of one."""
        if isinstance(inputs, _Encoded):
            return inputs
        return self._encoded(_as_lists(inputs))

    def _forward(self, inputs: dict[str, torch.Tensor], return_codes: bool = False) -> dict[str, torch.Tensor]:
        outputs = self.model(**inputs, output_attentions=return_codes)
        found = {"logits": outputs.logits}
        if return_codes:
            num_answers = self.model.config.num_answers
            found["codes"] = torch.stack([layer[:, :, -num_answers:] for layer in outputs.attentions], dim=1)
        return found

    def postprocess(self, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        logits = outputs["logits"][0].float()
        codes = {"codes": outputs["codes"][0]} if "codes" in outputs else {}
        if not self._is_sraven:
            return {"answer": logits.item(), **codes}
        logits = logits.reshape(-1, self._num_values)
        return {"answer": logits.argmax(-1).tolist(), "scores": logits.softmax(-1).tolist(), **codes}

    def _encoded(self, rows) -> dict[str, torch.Tensor]:
        return _Encoded(self._encode_puzzle(rows) if self._is_sraven else self._encode_table(rows))

    def _encoded_nth(self, number: int, rows) -> dict[str, torch.Tensor]:
        try:
            return self._encoded(rows)
        except ValueError as error:
            raise ValueError(f"Input {number}: {error}") from None

    def _encode_puzzle(self, rows) -> dict[str, torch.Tensor]:
        if _is_without_rows(rows):
            rows = [rows[:GRID], rows[GRID : 2 * GRID], [*rows[2 * GRID :], None]]
        if not _is_list(rows, GRID) or not all(_is_list(row, GRID) for row in rows):
            raise ValueError(
                f"A puzzle is {GRID} rows of {GRID} panels, the last of which is None, got {_described(rows)}."
            )
        *panels, last = [panel for row in rows for panel in row]
        if last is not None:
            raise ValueError("The last panel is what the model answers, but it has a value: set it to None.")
        num_features, num_values = self.model.config.num_answers, self._num_values
        for number, panel in enumerate(panels):
            where = f"The panel in row {number // GRID + 1}, column {number % GRID + 1}"
            if panel is None:
                raise ValueError(f"{where} is missing: only the last panel of a puzzle may be None.")
            if not _is_list(panel, num_features):
                raise ValueError(f"{where} must hold {num_features} features, as this model reads, got {panel!r}.")
            if not all(type(value) is int and 0 <= value < num_values for value in panel):
                raise ValueError(f"{where} must hold integers in 0 to {num_values - 1}, got {panel!r}.")
        # The answer slots are tokens of their own.
        tokens = [value for panel in panels for value in panel] + [num_values] * num_features
        return {"input_ids": torch.tensor([tokens])}

    def _encode_table(self, rows) -> dict[str, torch.Tensor]:
        width = self.model.config.input_size
        if not isinstance(rows, list) or len(rows) < 2 or not all(_is_list(row, width) for row in rows):
            raise ValueError(
                f"A truth table is 2 or more rows of {width} numbers, {width - 1} variables and the function's value, "
                f"the last of which is None, got {_described(rows)}."
            )
        most = self.model.config.relative_attention_num_buckets
        if self.model.config.position_type == "relative" and len(rows) > most:
            raise ValueError(f"This model was made for at most {most} rows, got {len(rows)}: leave some out.")
        *numbers, last = [value for row in rows for value in row]
        if last is not None:
            raise ValueError("The last row's value is what the model answers, but it has a value: set it to None.")
        for number, value in enumerate(numbers):
            if type(value) not in (int, float) or not 0 <= value <= 1:  # NaN is refused too
                raise ValueError(
                    f"Row {number // width + 1} of the truth table must hold numbers in 0 to 1, got {value!r}: only the "
                    "last row's value may be None."
                )
        return {"input_values": torch.tensor([*numbers, 0.0]).reshape(1, len(rows), width)}


class _Encoded(dict):
    """The result of `preprocess`, which returns it unchanged. Because of this type, any other dict is refused."""


def _as_lists(inputs):
    """The inputs with lists in place of tuples, arrays and tensors."""
    if hasattr(inputs, "tolist"):
        inputs = inputs.tolist()  # of an array of objects these may be arrays again
    if not isinstance(inputs, (list, tuple)):
        return inputs
    if _SCALARS.issuperset(map(type, inputs)):  # a row or a panel
        return list(inputs)
    return [_as_lists(item) for item in inputs]


def _are_nested(inputs, depth: int) -> bool:
    """Whether there are lists in lists of this depth, or deeper."""
    return isinstance(inputs, list) and (depth == 1 or any(_are_nested(item, depth - 1) for item in inputs))


def _is_list(inputs, length: int) -> bool:
    return isinstance(inputs, list) and len(inputs) == length


def _is_without_rows(inputs) -> bool:
    """Whether these are the panels of a puzzle in one list, the last of them left out."""
    return _is_list(inputs, GRID**2 - 1) and all(isinstance(panel, list) for panel in inputs)


def _described(inputs) -> str:
    if not isinstance(inputs, list):
        return f"{type(inputs).__name__} {' '.join(repr(inputs).split())}"  # the repr of a tensor has several lines
    return f"{len(inputs)} of lengths {[len(i) if isinstance(i, list) else 0 for i in inputs]}"


def _collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if len({tensor.shape for item in items for tensor in item.values()}) > 1:
        raise ValueError("Truth tables of different lengths cannot share a batch: leave batch_size at 1.")
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


__all__ = ["SymbolicReasoningPipeline"]
