"""Texts of cards about language models."""

import numpy as np

from ..words import Words


# Tokens of a held-out document that the card's snippet goes on from, and those that it adds.
_SHOWN, _WRITTEN = 48, 96


class TextWords(Words):
    """Texts of cards about language models."""

    title = "language"
    dataset_title = "Documents"
    dataset_categories = ("text-generation",)

    def snippet(self, model_id: str) -> str:
        task = self.task
        shown = task.tokens["test"].rows(np.array([0]), min(_SHOWN, task.sequence_length), padding=0)["input_ids"][0]
        prompt = task.processing_class.decode(shown, skip_special_tokens=True)
        return f"""\
from transformers import pipeline

write = pipeline("text-generation", model="{model_id}", trust_remote_code=True)

# How a document begins that was held out of training.
prompt = {prompt!r}
print(write(prompt, max_new_tokens={_WRITTEN}, do_sample=False)[0]["generated_text"])"""
