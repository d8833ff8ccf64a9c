"""What cards say about a task, in Markdown. `Words` suits every task, and a subclass of it has a task's own texts."""

import dataclasses
from typing import Any

from ..utils import as_literal


@dataclasses.dataclass(frozen=True)
class HubMetric:
    """
    A task's metric as a repository that `evaluate.load` reads.

    Attributes:
        name: the name of the repository.
        class_name, function: the names of the class and the function in `hf_hyla.metrics`.
        description: a sentence for the card.
        example: arguments that the card shows with their result.
        inputs: a sentence about what the arguments hold.
    """

    name: str
    class_name: str
    function: str
    description: str
    example: dict[str, list[Any]]
    inputs: str


class Words:
    """
    The words of one task with its settings. A card leaves out whatever is empty.

    Attributes:
        title: the task's title, as it reads in the middle of a sentence.
        dataset_title: the title of the task's dataset.
        dataset_categories: the categories of the dataset, by the Hub's names of tasks.
        dataset_tags: tags of the dataset's card.
        metric: the task's metric as a repository, if it can be published.
        tags: tags of a model's card, besides the attention and the task's name.
        pipeline_tag: the Hub's name for what a model of the task does.
        dataset_id: the repository with the samples, if they do not come from `hyla data`; empty if there is no repository.
    """

    title: str = ""
    dataset_title: str = ""
    dataset_categories: tuple[str, ...] = ("other",)
    dataset_tags: tuple[str, ...] = ("synthetic", "hyla")
    metric: HubMetric | None = None
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    dataset_id: str | None = None

    def __init__(self, task: Any):
        self.task = task
        self.title = self.title or task.name
        self.dataset_title = self.dataset_title or self.title

    def model(self) -> str:
        """What a model reads and answers, and what was held out of its training."""
        return ""

    def metrics(self) -> str:
        """What the scores mean."""
        return ""

    def ceiling(self, split: str) -> float | None:
        """The headline score that no model can expect to exceed on a split, if a committed record has one."""
        return None

    def probed(self, fixed_query: bool, attention_type: str) -> str:
        """Which codes the probes read, and what they ask for. See `Task.query_point` for a fixed query."""
        return "The probes read the code of each answer token for itself."

    def asked(self) -> str:
        """A sentence about what the snippet asks."""
        return f"The question is the first sample of `{self.task.headline_split}`."

    def limits(self) -> list[str]:
        """Sentences on what the model cannot do."""
        limits = ["It was trained for this one task, in exactly this size."]
        return limits + ["`ood` are new combinations of parts that occur in training."] * ("ood" in self.task.splits)

    def snippet(self, model_id: str) -> str:
        """Python that loads the model, asks it the first sample of the headline split, and prints the answer."""
        read = next(name for name in self.task.model_columns if name != "labels")
        split = self.task.headline_split
        sample = self.task.dataset(split)[0]
        return f"""\
import torch
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained({as_literal(model_id)}, trust_remote_code=True)

# The first sample of {split}: {self.task.splits[split]}.
{read} = torch.tensor([{sample[read].tolist()}])
with torch.no_grad():
    logits = model({read}={read}).logits
print(f"logits {{logits[0].tolist()}}, right is {sample["labels"].tolist()}")"""

    def dataset(self) -> str:
        """What a sample of the dataset is."""
        return ""

    def inputs(self) -> str:
        """Python that defines `to_inputs(rows)`, which turns rows of the dataset, as columns of arrays, into what a model reads."""
        names = ", ".join(f'"{name}": rows["{name}"]' for name in self.task.model_columns)
        return f"""\
def to_inputs(rows):
    return {{{names}}}"""

    def splits(self) -> str:
        """How the splits differ."""
        return (
            "The gap between `test` and `ood` is what matters." if {"test", "ood"} <= self.task.splits.keys() else ""
        )

    def fields(self) -> str:
        """The rows of a table: name, type and meaning of each column of the dataset."""
        return "\n".join(f"| `{name}` | {feature} | |" for name, feature in self.task.features().items())

    def text_fields(self) -> str:
        """The rows of the same table for the columns of a task as text."""
        return ""

    def text_notes(self) -> str:
        """A section, with its heading, about how a language model is asked and scored, for a folder with these columns."""
        return ""

    def dataset_notes(self) -> str:
        """A section, with its heading, about anything else that a reader of the dataset's card must know."""
        return ""

    def page(self) -> dict[str, str] | None:
        """
        `emoji`, `short_description` (at most 60 characters) and `about`, sentences for the card, of the Space that asks a
        model; `None` where there is no page for the task.
        """
        return None


class PaperWords(Words):
    """Texts that the two tasks of the paper share."""

    dataset_tags = ("compositional-generalization", "abstract-reasoning", "synthetic", "hyla", "arxiv:2406.05816")
    tags = ("compositional-generalization",)

    def limits(self) -> list[str]:
        occur = "may not all occur" if self.task.reference_split else "occur"
        new = f"`ood` are new combinations of parts that {occur} in training."
        if "extrapolation" in self.task.splits:
            new += " Parts that never occurred are `extrapolation`, which it is not expected to solve."
        one_task = (
            "It was trained for this one synthetic task, in exactly this size. It knows neither language nor images."
        )
        return [one_task, new]
