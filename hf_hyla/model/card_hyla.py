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
"""The card of a model or a config that `push_to_hub` uploads. It knows nothing about the training."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


# What transformers writes into the card of huggingface_hub's template that it uploads with a model.
_GENERATED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_ATTENTION = {
    "hyla": "HYLA, hypernetwork linear attention",
    "linear": "linear attention",
    "softmax": "softmax attention",
}
_MODEL = """\
```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```

The model's code lies beside its weights. Its training data and its scores are not known here, and should be added by whoever
uploaded it."""
_CONFIG = "This is its config only. There were no weights when this card was written."
_TEXT = """
# {name}

A transformer with {attention}, of the family of
[Attention as a Hypernetwork](https://arxiv.org/abs/2406.05816). It has {layers} with
{heads}, {width} wide. {size}It reads {reads}.

{rest}

If the model comes from a training run of hf_hyla, `hyla publish RUN --repo-id {repo_id}`
publishes it with a card that shows its training task and scores.
"""


def fill_in_card(folder: str | Path, repo_id: str, config, model=None) -> None:
    """
    Replaces transformers' empty card in a folder, or the card of a config without weights, by one that describes the config and,
    if it is uploaded too, the model. Any other card stays, and so does one of these two that somebody has edited.
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _GENERATED not in text and _CONFIG not in text:
        return  # whatever it is, unread: its metadata may be invalid
    card = ModelCard(text)
    if not _is_empty(card) and not _is_of_a_config(card):
        return
    tags = [*(card.data.get("tags") or []), "hyla", f"{config.attention_type}-attention"]
    card.data["tags"] = list(dict.fromkeys(tags))
    auto_class = getattr(model, "_auto_class", None) or "AutoModel"
    layers, heads = (
        f"{count} {name}" + "s" * (count != 1)
        for count, name in ((config.num_hidden_layers, "layer"), (config.num_attention_heads, "head"))
    )
    card.text = _TEXT.format(
        name=repo_id.rpartition("/")[2],
        attention=_ATTENTION[config.attention_type],
        layers=layers,
        heads=heads,
        width=config.hidden_size,
        size="" if model is None else f"It has {model.num_parameters():,} parameters. ",
        reads=(
            f"token ids below {config.vocab_size}"
            if config.vocab_size
            else f"tokens of {config.input_size} numbers each"
        ),
        rest=(_CONFIG if model is None else _MODEL).format(auto_class=auto_class, repo_id=repo_id),
        repo_id=repo_id,
    )
    card.save(path)


def _is_empty(card: ModelCard) -> bool:
    """Whether the text is transformers' own, without a change."""
    return card.text.split() == ModelCard.from_template(ModelCardData(), model_description=_GENERATED).text.split()


def _is_of_a_config(card: ModelCard) -> bool:
    """Whether the text is that of `fill_in_card` for a config without weights, without a change."""
    text = re.escape(_TEXT.strip().replace("{size}", "").replace("{rest}", _CONFIG))
    # A field is any text of one line that ends no sentence.
    return re.fullmatch(re.sub(r"\\{\w+\\}", r"(?:[^.\\n]|\\.\\S)+", text), card.text.strip()) is not None
