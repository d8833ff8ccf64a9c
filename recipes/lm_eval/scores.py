"""Scores of one SRAVEN puzzle, for the task files beside this one."""

import re


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """
    What a model's continuation of a prompt scores; means over puzzles are taken by the harness.

    Returns:
        `accuracy`, whether the first numbers of the first line are the answer; `feature_accuracy`, the fraction of right
        numbers; `accuracy_unique`, the accuracy, only for puzzles with one answer; `ideal_observer`, its accuracy.
    """
    right = [int(word) for word in doc["answer_text"].split()]
    line = results[0].strip().partition("\n")[0]
    found = [int(word) for word in re.findall(r"\d+", line)][: len(right)]
    solved = float(found == right)
    scores = {
        "accuracy": solved,
        "feature_accuracy": sum(a == b for a, b in zip(found, right, strict=False)) / len(right),
        "ideal_observer": float(doc["observer_right"]),
    }
    return scores if doc["ambiguous_strict"] else scores | {"accuracy_unique": solved}
