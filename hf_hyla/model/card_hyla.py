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

from pathlib import Path

from huggingface_hub import ModelCard


# What transformers' template writes in place of missing information.
_EMPTY = "[More Information Needed]"
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


def fill_in_card(folder: str | Path, repo_id: str, config, model=None) -> None:
    """
    Replaces transformers' empty card in a folder, or the card of a config without weights, by one that describes the config and,
    if it is uploaded too, the model. Any other card stays.
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _EMPTY not in text and _CONFIG not in text:
        return
    card = ModelCard(text)
    tags = [*(card.data.get("tags") or []), "hyla", f"{config.attention_type}-attention"]
    card.data["tags"] = list(dict.fromkeys(tags))
    auto_class = getattr(model, "_auto_class", None) or "AutoModel"
    size = "" if model is None else f"It has {model.num_parameters():,} parameters. "
    reads = (
        f"token ids below {config.vocab_size}" if config.vocab_size else f"tokens of {config.input_size} numbers each"
    )
    layers, heads = (
        f"{count} {name}" + "s" * (count != 1)
        for count, name in ((config.num_hidden_layers, "layer"), (config.num_attention_heads, "head"))
    )
    rest = (_CONFIG if model is None else _MODEL).format(auto_class=auto_class, repo_id=repo_id)
    card.text = f"""
# {repo_id.rpartition("/")[2]}

A transformer with {_ATTENTION[config.attention_type]}, of the family of
[Attention as a Hypernetwork](https://arxiv.org/abs/2406.05816). It has {layers} with
{heads}, {config.hidden_size} wide. {size}It reads {reads}.

{rest}

A run of the package hf_hyla holds weights, training data and scores: `hyla publish RUN --repo-id {repo_id}`
publishes it with a card that shows them.
"""
    card.save(path)
