"""Tokens of documents: bytes, or those of a tokenizer; and the rows that a model reads."""

import dataclasses

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...utils import one_line


BYTES = "bytes"
END = "<|endoftext|>"
_NUM_BYTES = 256
_TEXTS_AT_ONCE = 1000


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids are the bytes of a text in UTF-8, and 256 for the place where a text begins and ends."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, _NUM_BYTES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder or a repository, or `byte_tokenizer` for `"bytes"`.

    Raises:
        ValueError: if there is no such tokenizer, if it does not tell which part of a text a token stands for, or if it has no
            token that ends a text.
    """
    if name == BYTES:
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"There is no tokenizer {name} ({one_line(error):.300}): write 'bytes', the id of a repository, or a folder with "
            "tokenizer.json."
        ) from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer {name} does not tell which part of a text a token stands for, since it has no tokenizer.json: "
            "choose one that has."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name} has no eos_token to end a document with: set it, or choose another.")
    return tokenizer


@dataclasses.dataclass
class Tokens:
    """
    Documents as one array of tokens, and its rows. Each document begins and ends with the end token.

    A row holds `length` tokens of a single document. It begins with the last token of the row before, so every token of a
    document but the first is predicted once. The last row of a document may be shorter.

    Attributes:
        ids: (tokens,), the tokens of all documents, one document after the other.
        num_bytes: (tokens,), bytes of the text that each token stands for; they add up to the bytes of each document.
        starts, stops: (rows,), where each row begins and ends in `ids`.
    """

    ids: np.ndarray
    num_bytes: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, texts: list[str], tokenizer: PreTrainedTokenizerBase, name: str, length: int) -> "Tokens":
        """The tokens of some documents in rows of at most `length` tokens."""
        encoded = _as_bytes(texts) if name == BYTES else _as_tokens(texts, tokenizer)
        ids, num_bytes = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        ends = np.cumsum([len(part) for part, _ in encoded])
        starts, stops = [], []
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            of_document = np.arange(begin, end - 1, length - 1)
            starts.append(of_document)
            stops.append(np.minimum(of_document + length, end))
        return cls(ids, num_bytes, np.concatenate(starts), np.concatenate(stops))

    def rows(self, numbers: np.ndarray, length: int, padding: int) -> dict[str, np.ndarray]:
        """The rows with these numbers: `input_ids`, `labels` and `num_bytes`, each (rows, length)."""
        places = self.starts[numbers, None] + np.arange(length)
        is_token = places < self.stops[numbers, None]
        places = np.where(is_token, places, 0)
        ids = self.ids[places].astype(np.int64)
        # The first token of a row is not predicted in it.
        predicted = is_token & (np.arange(length) > 0)
        return {
            "input_ids": np.where(is_token, ids, padding),
            "labels": np.where(predicted, ids, -100),
            "num_bytes": np.where(predicted, self.num_bytes[places], 0).astype(np.int64),
        }


def _as_bytes(texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    encoded = []
    for text in texts:
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        ids = np.full(len(data) + 2, _NUM_BYTES, dtype=np.uint16)
        ids[1:-1] = data
        encoded.append((ids, (ids < _NUM_BYTES).astype(np.uint8)))
    return encoded


def _as_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, np.ndarray]]:
    encoded, end = [], tokenizer.eos_token_id
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[first : first + _TEXTS_AT_ONCE]
        found = tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(some, found["input_ids"], found["offset_mapping"], strict=True):
            # Bytes up to the end of each token. A character that several tokens share counts for the first of them, and text that
            # no token stands for counts for the next token.
            letters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            bytes_before = np.r_[0, np.cumsum(1 + sum(letters > last for last in (0x7F, 0x7FF, 0xFFFF)))]
            ends = np.maximum.accumulate([0, *(bytes_before[stop] for _, stop in offsets)])
            num_bytes = [0, *np.diff(ends), bytes_before[-1] - ends[-1]]
            encoded.append((np.array([end, *ids, end], dtype=dtype), np.array(num_bytes, dtype=np.uint32)))
    return encoded
