"""Tests of the task of language: documents, the split, tokens, rows, and bits per byte."""

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_hyla import HylaConfig, HylaForCausalLM
from hf_hyla.tasks import get_task
from hf_hyla.tasks.text import byte_tokenizer
from hf_hyla.tasks.text.documents import is_held_out


END = 256
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TEXTS = [f"document {n}: " + "naïve ☃ 😀 text\r\n" * (n % 5) + "x" * n for n in range(40)]


@pytest.fixture
def folder(tmp_path):
    for number, text in enumerate(TEXTS):
        path = tmp_path / "texts" / f"{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "texts" / ".hidden").write_bytes(b"\xff")
    return tmp_path / "texts"


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer that drops spaces and knows few letters, so that some characters are no token's."""
    inner = Tokenizer(models.BPE(unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(TEXTS[:3], trainers.BpeTrainer(vocab_size=60, special_tokens=["?", "<end>"]))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="<end>").save_pretrained(
        tmp_path / "small"
    )
    return tmp_path / "small"


def documents_of(task, split) -> list[str]:
    """The texts of a split, put together from its rows."""
    found = []
    for row in (
        task.samples(split, np.arange(task.num_samples[split]))["input_ids"] if split == "test" else ordered(task)
    ):
        tokens = row.tolist()
        if tokens[0] == END:
            found.append([])
        found[-1] += [token for token in tokens[1:] if token != END]
    return [bytes(document).decode() for document in found]


def ordered(task):
    tokens = task.tokens["train"]
    return tokens.rows(np.arange(len(tokens.starts)), task.sequence_length, END)["input_ids"]


@pytest.mark.parametrize("length", [2, 7, 64, 1000])
def test_every_document_is_in_one_split_whole_by_the_hash_of_its_path(folder, length):
    task = get_task("text", files=str(folder), held_out=0.3, sequence_length=length)
    expected = {"train": [], "test": []}
    for path in sorted(folder.rglob("*.txt"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        expected["test" if is_held_out(name, 0.3) else "train"].append(path.read_bytes().decode())
    assert {split: documents_of(task, split) for split in expected} == expected
    assert len(expected["test"]) > 3 and len(expected["train"]) > 3


def test_the_split_is_pinned_and_does_not_depend_on_the_seed(folder):
    names = ("abc.py", "json/decoder.py", "re/_parser.py", "os.py")
    assert [name for name in names if is_held_out(name, 0.24)] == ["json/decoder.py"]
    assert [name for name in names if is_held_out(name, 0.76)] == ["json/decoder.py", "re/_parser.py"]
    first, second = (get_task("text", files=str(folder), held_out=0.3, seed=seed) for seed in (0, 1))
    assert documents_of(first, "test") == documents_of(second, "test")
    assert first.fingerprint() != second.fingerprint()


def test_each_byte_and_each_end_is_predicted_once(folder):
    task = get_task("text", files=str(folder), held_out=0.3, sequence_length=9)
    samples = task.samples("test", np.arange(task.num_samples["test"]))
    texts = documents_of(task, "test")
    predicted = samples["labels"][samples["labels"] != -100]
    assert len(predicted) == sum(len(text.encode()) + 1 for text in texts)
    assert samples["num_bytes"].sum() == sum(len(text.encode()) for text in texts)
    assert (samples["labels"][:, 0] == -100).all()


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(folder):
    task = get_task("text", files=str(folder), held_out=0.3, sequence_length=16)
    count = task.num_samples["train"]
    rows = task.samples("train", np.arange(3 * count))["input_ids"].reshape(3, count, -1)
    orders = [sorted(map(tuple, epoch.tolist())) for epoch in rows]
    assert orders[0] == orders[1] == orders[2] == sorted(map(tuple, ordered(task).tolist()))
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    other = get_task("text", files=str(folder), held_out=0.3, sequence_length=16, seed=1)
    assert not np.array_equal(other.samples("train", np.arange(count))["input_ids"], rows[0])
    for start in (0, count - 2, 2 * count + 1):  # sample i does not depend on the batch that it is drawn in
        some = task.samples("train", np.arange(start, start + 4))["input_ids"]
        alone = [task.samples("train", [i])["input_ids"][0] for i in range(start, start + 4)]
        assert np.array_equal(some, alone)


def test_a_changed_document_changes_the_loss_of_no_other(folder):
    def losses():
        task = get_task("text", files=str(folder), held_out=0.3, sequence_length=16)
        samples = task.samples("test", np.arange(task.num_samples["test"]))
        batch = {name: torch.from_numpy(samples[name]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        return task.predictions(logits, batch["labels"]).numpy(), samples["input_ids"][:, 0] == END

    torch.manual_seed(0)
    model = HylaForCausalLM(HylaConfig(**get_task("text").model_interface, **SMALL)).eval()
    changed = next(
        path for path in sorted(folder.rglob("*.txt")) if is_held_out(path.relative_to(folder).as_posix(), 0.3)
    )
    before, begins = losses()
    text = changed.read_bytes()
    changed.write_bytes(text[:5] + b"#" + text[6:])
    after, _ = losses()
    of_first = np.cumsum(begins) == 1  # documents are sorted by path
    assert np.array_equal(before[~of_first], after[~of_first]) and not np.array_equal(
        before[of_first], after[of_first]
    )
    assert (~of_first).sum() > 3


def test_padding_has_no_part_in_the_loss_of_the_model(folder):
    task = get_task("text", files=str(folder), held_out=0.3, sequence_length=64)
    sample = next(row for row in task.dataset("test") if 3 < (row["labels"] != -100).sum() < 30)
    count = int((sample["labels"] != -100).sum())
    torch.manual_seed(0)
    model = HylaForCausalLM(HylaConfig(**task.model_interface, **SMALL)).eval()
    ids, labels = (torch.from_numpy(sample[name])[None] for name in ("input_ids", "labels"))
    alone = model(input_ids=ids[:, : count + 1], labels=ids[:, : count + 1]).loss.item()
    assert model(input_ids=ids, labels=labels).loss.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["bytes", "tokenizer"])
def test_bits_per_byte_and_perplexity_are_those_of_a_plain_loop(folder, tokenizer, own):
    settings = {"tokenizer": str(tokenizer)} if own else {}
    task = get_task("text", files=str(folder), held_out=0.3, sequence_length=12, **settings)
    rows = task.num_samples["test"]
    batch = task.collate(task.dataset("test").__getitems__(range(rows)))
    logits = 5 * torch.randn(rows, 12, task.model_interface["vocab_size"], generator=torch.Generator().manual_seed(0))
    nats, count = 0.0, 0
    for row in range(rows):
        for place in range(1, 12):
            token = int(batch["labels"][row, place])
            if token != -100:
                scores = logits[row, place - 1].double()
                nats -= float(scores[token] - torch.logsumexp(scores, 0))
                count += 1
    num_bytes = sum(
        path.stat().st_size for path in folder.rglob("*.txt") if is_held_out(path.relative_to(folder).as_posix(), 0.3)
    )
    labels = tuple(batch[name] for name in task.label_columns)
    predictions = task.predictions(logits, labels).numpy()
    found = task.metrics(predictions, tuple(column.numpy() for column in labels), batch["input_ids"].numpy())
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert found["loss"] == pytest.approx(nats / count, rel=1e-6)


def test_byte_tokens_are_those_of_the_tokenizer_that_is_saved(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in (*TEXTS, "\t\x00\r\n  <s> ", "".join(map(chr, range(0x2FF)))):
        assert loaded(text)["input_ids"] == [END, *text.encode()]
        assert loaded.decode(loaded(text)["input_ids"][1:]) == text
    assert len(loaded) == 257 and loaded.eos_token_id == loaded.bos_token_id == END


def test_the_bytes_of_tokens_add_up_to_each_document(folder, tokenizer):
    task = get_task("text", files=str(folder), held_out=0.3, tokenizer=str(tokenizer), sequence_length=1000)
    samples = task.samples("test", np.arange(task.num_samples["test"]))
    texts = documents_of(get_task("text", files=str(folder), held_out=0.3), "test")
    assert samples["num_bytes"].sum(axis=1).tolist() == [len(text.encode()) for text in texts]
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    assert (
        samples["input_ids"][0, 1 : 1 + len(loaded(texts[0])["input_ids"])].tolist() == loaded(texts[0])["input_ids"]
    )
    assert task.model_interface["vocab_size"] == len(loaded)


def test_a_pattern_and_a_folder_name_the_same_documents(folder):
    of_folder, of_pattern = (
        get_task("text", files=name, held_out=0.3) for name in (str(folder), f"{folder}/**/*.txt")
    )
    assert of_folder.fingerprint() == of_pattern.fingerprint()
    fewer = get_task("text", files=f"{folder}/0/*.txt", held_out=0.3)
    assert sum(fewer.num_samples.values()) < sum(of_folder.num_samples.values())


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    columns = {"text": TEXTS, "page": [text.upper() for text in TEXTS], "number": list(range(40))}
    for split, part in (("train", slice(0, 30)), ("validation", slice(30, 40))):
        some = {name: values[part] for name, values in columns.items()}
        datasets.Dataset.from_dict(some).to_json(tmp_path / "rows" / f"{split}.jsonl")
    return tmp_path / "rows"


def test_a_dataset_holds_a_document_in_each_row(rows):
    task = get_task("text", dataset_name=str(rows), held_out=0.3)
    held_out = [text for text in TEXTS[:30] if is_held_out(text, 0.3)]
    assert documents_of(task, "test") == held_out and 3 < len(held_out) < 27
    task = get_task("text", dataset_name=str(rows), dataset_split="train[:10]", dataset_test_split="validation")
    assert documents_of(task, "train") == TEXTS[:10] and documents_of(task, "test") == TEXTS[30:]
    task = get_task("text", dataset_name=str(rows), text_column="page", dataset_test_split="validation")
    assert documents_of(task, "test") == [text.upper() for text in TEXTS[30:]]


def test_documents_of_the_test_split_are_left_out_of_training(rows, caplog):
    task = get_task("text", dataset_name=str(rows), dataset_split="train[:10]", dataset_test_split="train[4:6]")
    assert documents_of(task, "train") == TEXTS[:4] + TEXTS[6:10] and documents_of(task, "test") == TEXTS[4:6]
    assert "2 of the 10 documents for training are left out" in caplog.text
    task = get_task("text", dataset_name=str(rows), dataset_split="train[:10]", dataset_test_split="train")
    with pytest.raises(ValueError, match=r"0 for train and 30 for test documents, .* or name other splits"):
        task.dataset("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset_name": "{rows}", "text_column": "txt"},
            r"has no column 'txt' \(did you mean 'text'\?\): set text_column",
        ),
        ({"dataset_name": "{rows}", "text_column": "number"}, "The column number .* does not hold text in every row"),
        ({"dataset_name": "{rows}", "dataset_split": "tests"}, "tests cannot be loaded"),
        ({"dataset_name": "{rows}/none"}, "none, train cannot be loaded"),
    ],
)
def test_a_dataset_without_such_texts_is_refused(rows, settings, message):
    task = get_task("text", **{name: value.format(rows=rows) for name, value in settings.items()})
    with pytest.raises(ValueError, match=message):
        task.dataset("train")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"files": "{folder}/none"}, OSError, "There is no file or folder .*none"),
        ({"files": "{folder}/*.md"}, OSError, "No file matches .*\\.md"),
        ({"files": "{folder}/0/0.txt"}, ValueError, "needs at least one: each file or row is one document"),
        ({"files": "{folder}/.hidden"}, ValueError, "is not text in UTF-8"),
        ({"tokenizer": "{folder}"}, ValueError, "There is no tokenizer .*texts"),
    ],
)
def test_files_and_tokenizers_that_are_not_there_are_refused(folder, settings, error, message):
    task = get_task(
        "text", **{"files": str(folder)} | {name: text.format(folder=folder) for name, text in settings.items()}
    )
    with pytest.raises(error, match=message):
        task.dataset("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": "a", "dataset_name": "b"}, "both say where documents come from"),
        ({"text_column": "page"}, "text_column belongs to a dataset_name, which is missing"),
        ({"files": "a", "dataset_split": "test"}, "dataset_split belongs to a dataset_name"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
        (
            {"dataset_name": "b", "dataset_test_split": "test", "held_out": 0.1},
            "held_out=0.1 has no effect, since dataset_test_split names the documents that are held out",
        ),
        ({"sequence_length": 1}, "sequence_length must be 2 to"),
        ({"reference_split": True}, "text has none"),
        ({"dataset": "b"}, "has no setting 'dataset'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_task("text", **settings)


def test_the_default_documents_are_the_librarys_sources_without_its_tests():
    task = get_task("text")
    texts = documents_of(task, "test")
    import json.decoder
    import pathlib

    everything = set(texts) | set(documents_of(task, "train"))
    assert pathlib.Path(json.decoder.__file__).read_bytes().decode() in everything
    assert not any("class TestCase" in text and "test_support" in text for text in everything)
    assert sum(len(text.encode()) for text in texts) < 0.25 * sum(len(text.encode()) for text in everything)
    assert task.num_samples["train"] > 5_000


def test_a_name_of_any_bytes_belongs_to_a_split():
    assert isinstance(is_held_out(b"caf\xe9.txt".decode(errors="surrogateescape"), 0.5), bool)
