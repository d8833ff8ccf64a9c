"""Language: the documents, their tokens, the task of predicting the next one, and texts for cards."""

from .task import TextTask
from .tokens import byte_tokenizer


__all__ = ["TextTask", "byte_tokenizer"]
