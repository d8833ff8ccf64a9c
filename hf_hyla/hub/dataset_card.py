"""The card of a dataset, from the content of its folder. The template is templates/dataset_card.md."""

import dataclasses
from pathlib import Path

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from ..tasks import Task
from ..tasks.data import Manifest, features_of
from ..utils import write_whole
from .cards import CITATION, LICENSE, template


_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def write_dataset_card(task: Task, folder: Path) -> None:
    """Writes README.md into a folder of `write_data`."""
    write_whole(folder / "README.md", str(dataset_card(task, Manifest.load(folder))))


def dataset_card(task: Task, manifest: Manifest) -> DatasetCard:
    """The card of a folder: its splits and how they differ, fields, examples, and the highest accuracy to expect."""
    defaults = {field.name: field.default for field in dataclasses.fields(task)}
    changed = {name: value for name, value in task.settings.items() if value != defaults[name]}
    return DatasetCard.from_template(
        _metadata(task, manifest),
        template_str=template("dataset_card.md"),
        task=task,
        words=task.words(task),
        fingerprint=manifest.data_fingerprint,
        splits=manifest.splits,
        text=manifest.text,
        combinations={split: len(task.combinations(split)) for split in manifest.splits},
        changed=changed,
        examples={split: task.show(task.dataset(split)[0]) for split in manifest.splits},
        arguments=", ".join([f'"{task.reference}"', *(f"{name}={value!r}" for name, value in changed.items())]),
        citation=CITATION,
    )


def _metadata(task: Task, manifest: Manifest) -> DatasetCardData:
    words = task.words(task)
    total = sum(split["num_examples"] for split in manifest.splits.values())
    data = DatasetCardData(
        pretty_name=words.dataset_title,
        license=LICENSE,
        annotations_creators=["machine-generated"],
        task_categories=list(words.dataset_categories),
        size_categories=[next((name for name, limit in _SIZES if total < limit), "10M<n<100M")],
        tags=list(words.dataset_tags),
    )
    info = DatasetInfo(
        features=features_of(task, manifest.text),
        splits=SplitDict(
            {
                split: SplitInfo(split, held["num_bytes"], held["num_examples"])
                for split, held in manifest.splits.items()
            }
        ),
        download_size=sum(held["file_bytes"] for held in manifest.splits.values()),
        dataset_size=sum(held["num_bytes"] for held in manifest.splits.values()),
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in manifest.splits]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(data)
    return data
