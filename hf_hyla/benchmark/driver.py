"""
The process of one side of `hyla bench --against`. It times training steps and attention of the package in the folder where it
is started. It runs with other commits of the package too, so it uses only what all of them have.

It is a script. Its argument says in JSON what to measure. For each line that it reads, `step` or `attention`, it runs that
workload once, and writes a line with the seconds that it took.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    # Only answers go to standard output. Whatever else is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch
    import transformers
    from transformers import AttentionInterface

    from hf_hyla.training import load_recipe

    asked = json.loads(sys.argv[1])
    imported = Path(sys.modules["hf_hyla"].__file__ or "").resolve()
    if not imported.is_relative_to(Path.cwd().resolve()):
        sys.exit(f"hf_hyla is imported from {imported}, not from {Path.cwd()}.")
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe: Any = load_recipe(asked["recipe"], asked["overrides"])
    size = asked["batch_size"] or recipe.trainer.get("train_batch_size") or 128
    dataset = recipe.task.dataset("train")
    batches = [recipe.task.collate(dataset.__getitems__(range(n * size, (n + 1) * size))) for n in range(8)]
    batches = [{name: column.to(device) for name, column in batch.items()} for batch in batches]
    # Tasks of older commits have no `auto_class`, since there were no language models yet.
    auto_class = getattr(transformers, getattr(recipe.task, "auto_class", "AutoModelForSequenceClassification"))
    model: Any = auto_class.from_config(recipe.config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    endless = itertools.cycle(batches)

    config, layer = model.config, model.model.layers[0].self_attn
    length = batches[0][recipe.task.model_columns[0]].shape[1]
    heads, width, value_width = config.num_attention_heads, config.head_dim, config.value_head_dim
    dtype = torch.bfloat16 if asked["bf16"] else torch.float32
    inputs = [
        torch.randn(size, length, heads, each, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for each in (width, width, value_width)
    ]
    bias = None
    if config.position_type == "relative":
        bias = torch.randn(heads, 2 * length - 1, device=device, requires_grad=True)
    gradient = torch.randn(size, length, heads, value_width, device=device, dtype=dtype)
    mask = (
        torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        if getattr(config, "is_causal", False)
        else None
    )
    attention = AttentionInterface()["hyla"]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=asked["bf16"])

    def step() -> None:
        with autocast():
            loss = model(**next(endless)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def attend() -> None:
        with autocast():
            output, _ = attention(
                layer, *inputs, mask, scaling=layer.scaling, dropout=config.attention_dropout, position_bias=bias
            )
        leaves = [tensor for tensor in (*inputs, bias) if tensor is not None]
        torch.autograd.grad(output, leaves, gradient.to(output.dtype))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    workloads = {"step": step, "attention": attend}
    print("ready", file=answers)
    for line in sys.stdin:
        wait()
        started = time.perf_counter()
        workloads[line.strip()]()
        wait()
        print(time.perf_counter() - started, file=answers)


if __name__ == "__main__":
    main()
