"""Loads a trained fuzzy-logic model as any transformers model and asks it one question: python recipes/logic/ask.py RUN"""

import sys

import torch
from transformers import AutoModelForSequenceClassification

import hf_hyla  # noqa: F401  registers the model with transformers
from hf_hyla.runs import Run


run = Run.load(sys.argv[1])
task = run.task
model = AutoModelForSequenceClassification.from_pretrained(run.folder).eval()

sample = task.dataset("ood")[0]
with torch.no_grad():
    answer = model(input_values=torch.from_numpy(sample["input_values"])[None]).logits.item()


def conjunction(term: int) -> str:
    return " and ".join(f"x{i}" if bit == "1" else f"not x{i}" for i, bit in enumerate(task.part_name(term), start=1))


point = ", ".join(f"{x:.2f}" for x in sample["input_values"][-1, :-1])
print("\nA function whose combination of terms the model has never seen in training:")
print("  f = " + " or ".join(f"({conjunction(term)})" for term in sample["terms"]))
print(f"It is shown {task.num_examples - 1} points (x1 ... x{task.num_variables}, f), and asked for f({point}).")
print(f"  answer {answer:.3f}, true value {sample['labels']:.3f}")
