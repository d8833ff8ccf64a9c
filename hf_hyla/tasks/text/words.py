"""Texts of cards about language models."""

import re
from typing import Any

import numpy as np

from ...utils import as_literal
from ..words import Words


# The number of tokens of a held-out document that the card's snippet continues, and the number that it adds.
_SHOWN, _WRITTEN = 64, 96


class TextWords(Words):
    """Texts of cards about language models."""

    title = "language"
    tags = ("text-generation",)
    pipeline_tag = "text-generation"

    def __init__(self, task: Any):
        super().__init__(task)
        # The path of somebody's folder does not name a repository.
        name = task.dataset_name or ""
        self.dataset_id = name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else ""

    def _documents(self) -> str:
        task = self.task
        if task.dataset_name:
            rows = ", ".join(filter(None, [task.dataset_config_name, task.dataset_split]))
            return f"the column `{task.text_column}` of a dataset ({rows})"
        if task.files:
            return "files of text"
        return "the Python sources of an interpreter's standard library, without its tests"

    def model(self) -> str:
        task = self.task
        tokens = "the bytes of a text in UTF-8" if task.tokenizer == "bytes" else "the tokens of its tokenizer"
        if task.dataset_test_split:
            held_out = f"the split `{task.dataset_test_split}` of the dataset"
        else:
            held_out = f"{100 * task.held_out:g} % of the documents, chosen by a hash of each"
        return f"""\
It reads {tokens}, and predicts the next one. It was trained on {self._documents()}, in rows of
{task.sequence_length:,} tokens of a single document. `test` is {held_out}, and none of them was trained on."""

    def metrics(self) -> str:
        return """\
`bits_per_byte` is the negative base-2 logarithm of the probability of all held-out documents, divided by their bytes. Lower is
better: 8 for a model that knows nothing. `perplexity` is per token, and depends on the tokenizer."""

    def asked(self) -> str:
        return "The model continues the beginning of a document that was held out."

    def limits(self) -> list[str]:
        return [
            "It knows nothing but the documents that it was trained on.",
            "It is a small language model for comparing attentions. It states what is not true, and repeats itself.",
            f"It was trained on rows of {self.task.sequence_length:,} tokens, and longer texts have not been tried.",
        ]

    def snippet(self, model_id: str) -> str:
        task = self.task
        rows = task.tokens["test"].rows(
            np.arange(min(10, task.num_samples["test"])), min(_SHOWN, task.sequence_length), padding=0
        )
        prompts = [task.processing_class.decode(ids, skip_special_tokens=True) for ids in rows["input_ids"]]
        # A fence of Markdown would end the snippet.
        prompt = next((prompt for prompt in prompts if "```" not in prompt), "")
        return f"""\
from transformers import pipeline

write = pipeline("text-generation", model={as_literal(model_id)}, trust_remote_code=True)

prompt = {prompt!r}
print(write(prompt, max_new_tokens={_WRITTEN}, do_sample=False)[0]["generated_text"])"""

    def splits(self) -> str:
        return "The documents of `test` were held out of training."
