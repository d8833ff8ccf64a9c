"""What cards say of SRAVEN."""

import json
from typing import Any

from ...utils import as_literal, recipes_folder
from ..words import HubMetric, PaperWords
from .rules import GRID


class SravenWords(PaperWords):
    """What cards say of SRAVEN."""

    title = "SRAVEN, symbolic Raven's progressive matrices"
    dataset_title = title
    metric = HubMetric(
        name="hyla_sraven_accuracy",
        class_name="SravenAccuracy",
        function="sraven_accuracy",
        description="The fraction of puzzles whose answer is right in every feature, and the fraction of right features.",
        example={"predictions": [[1, 2, 3, 4], [5, 6, 7, 0]], "references": [[1, 2, 3, 4], [5, 6, 7, 1]]},
        inputs="Each argument is a list of answers, each a list of integers, one per feature.",
    )

    def model(self) -> str:
        task, permuted = self.task, ""
        if task.permute:
            permuted = (
                ", and every column lists the numbers in an order of its own, so that the model has to find out which belong "
                "together"
            )
        return f"""\
It reads a 3 × 3 grid of panels, each {task.num_features} numbers from 0 to {task.num_values - 1}, and answers with the last panel. One rule per number
governs every row{permuted}.
Some combinations of rules are held out of training."""

    def metrics(self) -> str:
        return f"""\
A puzzle counts for `accuracy` only if every number of the answer is right; `feature_accuracy` is the fraction of right numbers,
of which guessing gets {1 / self.task.num_values:.4f}; `accuracy_unique` is the accuracy on puzzles that have only one answer."""

    def probed(self, fixed_query: bool, attention_type: str) -> str:
        return """\
The probes read each
answer token's codes for the two cells of its feature in the last row. They ask for the rule of that feature (`rule`) and for the
answer (`target`)."""

    def limits(self) -> list[str]:
        return [
            *super().limits(),
            "Some puzzles admit more than one answer that fits a set of rules; only the one it was made with counts as right.",
        ]

    def snippet(self, model_id: str) -> str:
        sample = self.task.dataset("ood")[0]
        rows = sample["input_ids"].reshape(GRID, GRID, -1).tolist()
        rows[-1][-1] = None
        lines = "".join(f"\n    {row}," for row in rows)
        return f"""\
from transformers import pipeline

solve = pipeline("symbolic-reasoning", model={as_literal(model_id)}, trust_remote_code=True)

# Three rows of three panels, the last of which is asked for. The rules of this puzzle were never trained in this combination.
puzzle = [{lines}
]
print(f"answer {{solve(puzzle)['answer']}}, right is {sample["labels"].tolist()}")"""

    def dataset(self) -> str:
        task = self.task
        if task.permute:
            columns = """\
In every column the features are permuted, the same way in all rows, so that a solver must first find out which features
belong together."""
        else:
            columns = "The features have the same order in every column: this is the variant without permutations."
        unique = "\nOnly puzzles with a unique answer were kept." if task.unambiguous else ""
        return f"""\
A puzzle is a 3 × 3 grid of panels, each of {task.num_features} integers from 0 to {task.num_values - 1}. Eight panels are shown, the ninth is asked for.
One rule per feature governs every row:

- *constant*: one value per row;
- *progression* +1, +2, −1 or −2 from column to column, from a start that each row draws for itself;
- *sum* and *difference*: the third cell is the first plus, or minus, the second;
- *distribute three*: three different symbols for the puzzle, in a fresh order in every row.

All arithmetic is modulo {task.num_values}. A task is the multiset of its {task.num_features} rules.
{columns}{unique}"""

    def inputs(self) -> str:
        task = self.task
        return f"""\
def to_inputs(rows):
    shown = rows["panels"].reshape(len(rows["panels"]), -1)  # (puzzles, {(GRID * GRID - 1) * task.num_features})
    slots = np.full_like(rows["answer"], {task.num_values})  # what the model reads where it answers
    return {{"input_ids": np.concatenate([shown, slots], axis=1), "labels": rows["answer"]}}"""

    def splits(self) -> str:
        trained = "" if self.task.reference_split else "; each of\ntheir rules occurs in training"
        return f"""\
{self.task.held_out * 100:g} % of the combinations are held out of training and make `ood`{trained}. The gap between `test` and `ood` is what matters.

The official loaders draw their splits from one stream of random numbers, so that
batch i of the test data is batch i of the training data, bit for bit. Here every split has a stream of its own."""

    def fields(self) -> str:
        features = self.task.num_features
        return f"""\
| `panels` | 8 × {features} integers | the panels that are shown, row by row |
| `answer` | {features} integers | the ninth panel |
| `rules` | {features} class labels | the rules of the features before these are permuted, sorted |
| `permutations` | 3 × {features} integers | of each column: its feature j was feature `permutations[column][j]` |
| `ambiguous_official` | bool | some explanation predicts another value for every feature of the answer |
| `ambiguous_strict` | bool | some explanation predicts another value for at least one: the answer is not unique |"""

    def text_fields(self) -> str:
        return """\
| `prompt` | text | instruction and puzzle, which end with `Answer:` |
| `prompt_with_examples` | text | the same, with three solved puzzles of the split train in between |
| `answer_text` | text | the ninth panel, as it should follow |
| `observer_right` | bool | whether the ideal observer, who knows the combinations of rules of the split, is right |"""

    def text_notes(self) -> str:
        return """\
## For language models

`prompt` or `prompt_with_examples` asks any causal model, and `answer_text` is what should follow. lm-evaluation-harness scores one
by the task files of hf_hyla, which `hyla recipes lm_eval --output .` copies; their `dataset_path` names this folder:

```bash
lm_eval --model hf --model_args pretrained=ORG/MODEL --include_path lm_eval --tasks sraven,sraven_examples
```

`accuracy_unique` leaves out puzzles with more than one answer, and `ideal_observer` is the highest accuracy to expect on the same
puzzles."""

    def dataset_notes(self) -> str:
        return f"""\
## Ambiguity, and the ceiling

The eight panels do not always determine the ninth. An *explanation* pairs the features of the columns and gives each triple a
rule that fits it. The statistics above say how often some explanation predicts another panel. The official check counts only
puzzles for which an explanation is wrong in every feature, which is rare; yet one wrong feature makes an answer wrong.

{self._observer()}
"""

    def ceiling(self, split: str) -> float | None:
        return self._observed().get(split, {}).get("accuracy")

    def _observed(self) -> dict[str, dict[str, Any]]:
        """Scores of the ideal observer by split, of its committed record; empty if that is about other settings."""
        record = json.loads((recipes_folder() / "results" / "sraven-ideal-observer.json").read_text())
        return record["splits"] if record["task"] == self.task.spec else {}

    def _observer(self) -> str:
        """What the ideal observer reaches."""
        observed = self._observed()
        if not observed:
            return (
                "What an ideal observer reaches has not been recorded for these settings; `hyla ceiling` computes it."
            )
        rows = "\n".join(
            f"| `{split}` | {scores['accuracy']:.4f} ± {scores['standard_error']:.4f} | "
            f"{scores['accuracy_all_combinations']:.4f} | {scores['accuracy_unique']:.4f} | {scores['num_samples']:,} |"
            for split, scores in observed.items()
        )
        ambiguous = "; ".join(
            f"{scores['ambiguous_official'] * 100:.2f} % of `{split}` are ambiguous by the official check, "
            f"{scores['ambiguous_strict'] * 100:.1f} % strictly"
            for split, scores in observed.items()
        )
        return f"""\
An ideal observer knows the generator and the rule combinations of the split, weighs all explanations exactly, and answers with
the most probable panel. No model can expect to be right more often:

| split | accuracy of the ideal observer | not knowing which combinations the split has | on unique puzzles | puzzles |
| --- | ---: | ---: | ---: | ---: |
{rows}

Among these puzzles, {ambiguous}."""

    def page(self) -> dict[str, str]:
        return {
            "emoji": "🧩",
            "short_description": "Raven's puzzles: answers and latent codes of attention",
            "about": "A board of Raven's progressive matrices: draw a puzzle, choose its rules or change a panel, and see the "
            "answers, how probable each digit is, and the latent codes, beside the verdict of an ideal observer.",
        }
