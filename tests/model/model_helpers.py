"""Helpers for tests of the model: rows of Table A1, plain loops, random inputs and models."""

import dataclasses
import itertools
import math

import torch

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model.attention_hyla import RMS_HEAD_EPS, activation_or_none
from hf_hyla.model.inputs_hyla import CACHE_NAME


BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUE_WIDTH = 2, 3, 4, 5, 2, 3

# attention_type, score_norm, value_activation, value_depth
ROWS = [
    ("softmax", "softmax", "none", 1),
    ("linear", "none", "none", 1),
    ("hyla", "rms_head", "relu", 1),
    ("linear", "rms_head", "none", 1),
    ("linear", "rms_head", "relu", 1),
    ("hyla", "none", "relu", 1),
    ("hyla", "rms_head", "none", 1),
    ("hyla", "none", "none", 1),
    ("hyla", "softmax", "relu", 1),
    ("hyla", "rms_head", "relu", 2),
]
ROW_IDS = ["-".join(map(str, row)) for row in ROWS]
HYLA, HYLA_PLUS, LINEAR, SOFTMAX = (
    ("hyla", "rms_head", "relu", 1),
    ("hyla", "rms_head", "relu", 2),
    ("linear", "none", "none", 1),
    ("softmax", "softmax", "none", 1),
)
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
ATTENTION_TYPES = ["hyla", "linear", "softmax"]


class Layer:
    """What attention functions read of a layer."""

    training = False

    def __init__(self, attention_type, score_norm, value_activation, value_mixing):
        self.attention_type = attention_type
        self.score_norm = score_norm
        self.value_activation = activation_or_none(value_activation)
        self.value_mixing = value_mixing


def loop(row, query, key, value, mixing, attends, bias):
    """Output (batch, query, heads, value width), by the paper's sums, one number at a time."""
    attention_type, score_norm, activation, _ = row
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2:]

    def phi(vector):
        return [x if activation == "none" else x.clamp(min=0.0) for x in vector]

    out = torch.zeros(batch, queries, heads, value_width, dtype=torch.float64)
    rows = []
    for b, q in itertools.product(range(batch), range(queries)):
        score = [[None] * keys for _ in range(heads)]
        for h, k in itertools.product(range(heads), range(keys)):
            dot = sum(query[b, h, q, i] * key[b, h, k, i] for i in range(width)) / math.sqrt(width)
            score[h][k] = dot if bias is None else dot + bias[0, h, q, k]
        code = [[None] * keys for _ in range(heads)]
        if score_norm == "softmax":
            for h in range(heads):
                seen = [k for k in range(keys) if attends[b, 0, q, k]]
                total = sum(torch.exp(score[h][k]) for k in seen)
                for k in range(keys):
                    if not seen:
                        code[h][k] = score[h][k] * 0 + 1 / keys
                    else:
                        code[h][k] = torch.exp(score[h][k]) / total if k in seen else score[h][k] * 0
        else:
            for k in range(keys):
                column = [score[h][k] * (1.0 if attends[b, 0, q, k] else 0.0) for h in range(heads)]
                if score_norm == "rms_head":
                    root = torch.sqrt(sum(s * s for s in column) / heads + RMS_HEAD_EPS)
                    column = [s / root for s in column]
                for h in range(heads):
                    code[h][k] = column[h]
        row_out = [[out.new_zeros(()) for _ in range(value_width)] for _ in range(heads)]
        for k in range(keys):
            if attention_type == "hyla":
                hidden = phi([sum(code[h][k] * value[b, h, k, d] for h in range(heads)) for d in range(value_width)])
                if mixing is not None:
                    hidden = phi(
                        [
                            sum(
                                code[h][k] * mixing[h, e, d] * hidden[d]
                                for h in range(heads)
                                for d in range(value_width)
                            )
                            for e in range(value_width)
                        ]
                    )
            for h in range(heads):
                if attention_type != "hyla":
                    hidden = phi([value[b, h, k, d] for d in range(value_width)])
                for d in range(value_width):
                    row_out[h][d] = row_out[h][d] + code[h][k] * hidden[d]
        rows.append(torch.stack([torch.stack(h) for h in row_out]))
    return torch.stack(rows).view(batch, queries, heads, value_width)


def masks():
    everything = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    causal = everything.tril(KEYS - QUERIES)
    left, right = everything.clone(), everything.clone()
    left[1, :, :, :2] = False
    right[1, :, :, 3:] = False
    no_key = everything.clone()
    no_key[0, :, 1] = False
    return {
        "none": everything,
        "causal": causal,
        "left padding": left,
        "right padding": right,
        "fully masked row": no_key,
    }


@dataclasses.dataclass
class Case:
    batch: int = 3
    heads: int = 3
    queries: int = 19
    keys: int = 19
    width: int = 5
    value_width: int = 7
    mask: str = "none"
    dropout: float = 0.0

    def tensors(self, row, dtype) -> dict[str, torch.Tensor]:
        """Large random numbers, transposed as the projections of a model are."""
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape):
            return (1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        tensors = {
            "query": leaf(self.batch, self.queries, self.heads, self.width).transpose(1, 2),
            "key": leaf(self.batch, self.keys, self.heads, self.width).transpose(1, 2),
            "value": leaf(self.batch, self.keys, self.heads, self.value_width).transpose(1, 2),
            "position_bias": leaf(self.heads, self.queries + self.keys - 1),
        }
        if row[3] == 2:
            tensors["value_mixing"] = leaf(self.heads, self.value_width, self.value_width)
        return tensors

    def masked(self) -> torch.Tensor | None:
        everything = torch.ones(self.batch, 1, self.queries, self.keys, dtype=torch.bool)
        if self.mask == "causal":
            return everything[:1].tril(self.keys - self.queries)
        if self.mask == "padding":
            return torch.arange(self.keys)[None, :] < torch.tensor([self.keys, 1, 4])[: self.batch, None, None, None]
        if self.mask == "random":  # one query sees nothing, one key is never seen
            mask = torch.rand(everything.shape, generator=torch.Generator().manual_seed(1)) < 0.5
            mask[:, :, self.queries // 2], mask[:, :, :, 0] = False, False
            return mask
        return None


def filled_with_nan(allocate):
    def allocate_and_fill(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_and_fill


def make(scale: float = 3.0, seed: int = 0, **settings) -> HylaForSequenceClassification:
    """A model of which every parameter is large and random, so that none can be without effect."""
    torch.manual_seed(seed)
    model = HylaForSequenceClassification(HylaConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * scale / max(parameter.shape[-1], 4) ** 0.5)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
        if model.model.embed_tokens is not None and model.model.embed_tokens.padding_idx is not None:
            model.model.embed_tokens.weight[model.model.embed_tokens.padding_idx] = 0
    return model


def cache_of(outputs):
    return getattr(outputs, CACHE_NAME)


def ids(batch=3, length=10, vocab=9, seed=1):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
