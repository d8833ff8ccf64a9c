"""Tests of the pipeline: it encodes as the tasks do, answers as the model does, and refuses invalid puzzles."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, pipeline

from hf_hyla import HylaConfig, HylaForSequenceClassification, HylaModel, SymbolicReasoningPipeline
from hf_hyla.tasks import get_task


TASKS = {
    "sraven": get_task("sraven", num_features=3, num_values=5),
    "logic": get_task("logic", num_variables=3, num_terms=2, num_examples=6),
}


def make(task) -> HylaForSequenceClassification:
    """A model of the task with weights large enough that every part of its input shows in its answer."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    model = HylaForSequenceClassification(HylaConfig(**task.model_defaults | size)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter)
    return model


def puzzle_of(task, sample):
    """The sample as a user would write it down."""
    if task.name == "logic":
        rows = sample["input_values"].tolist()
        return [*rows[:-1], [*rows[-1][:-1], None]]
    panels = sample["input_ids"].reshape(3, 3, -1).tolist()
    panels[2][2] = None
    return panels


@pytest.fixture(scope="module", params=TASKS)
def case(request):
    """A task, its model, samples as the task collates them, and as a user writes them."""
    task = TASKS[request.param]
    samples = [task.dataset("test")[i] for i in range(7)]
    batch = task.collate(samples)
    del batch["labels"]
    model = make(task)
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True)
    return task, model, batch, outputs, [puzzle_of(task, sample) for sample in samples]


@pytest.fixture
def pipe(case):
    return pipeline("symbolic-reasoning", model=case[1], device="cpu")


def test_the_pipeline_encodes_puzzles_as_the_task_does(case, pipe):
    _, _, batch, _, puzzles = case
    for name, expected in batch.items():
        encoded = torch.cat([pipe.preprocess(puzzle)[name] for puzzle in puzzles])
        assert encoded.dtype == expected.dtype and torch.equal(encoded, expected)


@pytest.mark.parametrize("num_features", [2, 8])
def test_panels_in_one_list_are_a_puzzle_as_in_a_dataset(num_features):
    task = get_task("sraven", num_features=num_features)
    samples = task.samples("test", np.arange(3))
    table = task.to_table(samples)
    solve = pipeline("symbolic-reasoning", model=make(task), device="cpu")
    in_rows = [puzzle_of(task, {"input_ids": row}) for row in samples["input_ids"]]
    expected = [solve(puzzle)["answer"] for puzzle in in_rows]
    panels = table["panels"].tolist()
    assert [solve(puzzle)["answer"] for puzzle in panels] == expected
    assert [found["answer"] for found in solve(panels)] == expected
    assert [found["answer"] for found in solve(Dataset.from_dict({"panels": panels})["panels"])] == expected


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_pipeline_answers_as_the_model_does(case, pipe, batch_size):
    task, _, _, outputs, puzzles = case
    answers = pipe(puzzles, batch_size=batch_size)
    for answer, logits in zip(answers, outputs.logits, strict=True):
        if task.name == "logic":
            assert set(answer) == {"answer"} and math.isclose(
                answer["answer"], logits.item(), rel_tol=1e-5, abs_tol=1e-6
            )
        else:
            assert answer["answer"] == logits.argmax(-1).tolist()
            np.testing.assert_allclose(answer["scores"], logits.softmax(-1), rtol=1e-4, atol=1e-6)
    assert len({str(answer["answer"]) for answer in answers}) > 1


def test_codes_are_those_of_the_answer_tokens(case, pipe):
    _, model, batch, outputs, puzzles = case
    (name,) = batch
    length, answers = batch[name].shape[1], model.config.num_answers
    for number, answer in enumerate(pipe(puzzles, batch_size=4, return_codes=True)):
        assert answer["codes"].shape == (2, 4, answers, length)
        for layer, attention in enumerate(outputs.attentions):
            torch.testing.assert_close(answer["codes"][layer], attention[number, :, length - answers :])
    assert "codes" not in pipe(puzzles[0])


def test_one_puzzle_lists_arrays_and_generators_give_the_same_answers(case, pipe):
    task, _, _, _, puzzles = case
    alone = [pipe(puzzle) for puzzle in puzzles]
    assert alone == pipe(puzzles) == list(pipe(puzzle for puzzle in puzzles)) == list(pipe(iter(puzzles)))
    assert alone == list(pipe(Dataset.from_dict({"rows": puzzles})["rows"]))
    assert alone[0] == pipe(tuple(puzzles[0])) == pipe([puzzles[0]])[0]
    if task.name == "sraven":
        assert alone[0] == pipe([[panel and np.array(panel) for panel in row] for row in puzzles[0]])
        assert alone[0] == pipe([[panel and torch.tensor(panel) for panel in row] for row in puzzles[0]])


def test_several_workers_give_every_answer_once(case, pipe, caplog):
    *_, puzzles = case
    alone = pipe(puzzles)
    assert pipe(puzzles, num_workers=2) == alone and not caplog.records
    assert list(pipe(iter(puzzles), num_workers=2)) == alone
    assert [record.getMessage() for record in caplog.records] == [
        "Each worker would read all of an iterator, so num_workers is set to 1."
    ]


def test_a_model_in_training_answers_without_dropout(case, pipe):
    _, model, _, _, puzzles = case
    model.train()
    pipe = pipeline("symbolic-reasoning", model=model, device="cpu")
    assert pipe(puzzles[0]) == pipe(puzzles[0])


def test_the_pipeline_is_saved_with_every_model_and_loads_with_the_package(case, pipe, tmp_path):
    _, model, _, _, puzzles = case
    model.save_pretrained(tmp_path / "model")
    pipe.save_pretrained(tmp_path / "pipe")
    model.model.save_pretrained(tmp_path / "base")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "pipe", "base")]
    for name, config in zip(("model", "pipe", "base"), configs, strict=True):
        assert (tmp_path / name / "pipeline_hyla.py").is_file()
        assert config["custom_pipelines"] == configs[0]["custom_pipelines"] and "symbolic-reasoning" in str(config)
    # Even with leave, nothing of the folder runs where the package is installed.
    for path in (tmp_path / "model").glob("*_hyla.py"):
        path.write_text("raise SystemExit('the code of the folder runs')\n")
    pipeline("symbolic-reasoning", model=str(tmp_path / "model"), trust_remote_code=True)
    loaded = pipeline("symbolic-reasoning", model=str(tmp_path / "model"))
    assert type(loaded) is SymbolicReasoningPipeline and type(loaded.model) is HylaForSequenceClassification
    answers = [np.array([result["answer"] for result in each(puzzles)]) for each in (loaded, pipe)]
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "pipe").config == loaded.model.config


def changed(puzzle, *path, value):
    """The puzzle with another value at that place."""
    if not path:
        return value
    return [changed(item, *path[1:], value=value) if i == path[0] else item for i, item in enumerate(puzzle)]


PUZZLE = [[[0, 1, 2], [1, 1, 1], [2, 0, 4]]] * 2 + [[[0, 1, 2], [1, 1, 1], None]]
TABLE = [[0.1, 0.2, 0.3, 0.5]] * 5 + [[0.3, 0.9, 1.0, None]]


@pytest.mark.parametrize(
    ("task", "bad", "message"),
    [
        ("sraven", PUZZLE[:2], "3 rows of 3 panels"),
        ("sraven", [*PUZZLE, PUZZLE[0]], "3 rows of 3 panels"),
        ("sraven", changed(PUZZLE, 1, value=PUZZLE[1][:2]), "3 rows of 3 panels"),
        ("sraven", [panel for row in PUZZLE for panel in row], "3 rows of 3 panels"),
        ("sraven", [], "3 rows of 3 panels"),
        ("sraven", "a puzzle", "got str 'a puzzle'"),
        ("sraven", None, "3 rows of 3 panels"),
        ("sraven", {"input_ids": "x"}, "3 rows of 3 panels"),
        ("sraven", {"input_ids": torch.zeros(1, 27, dtype=torch.long)}, "3 rows of 3 panels"),
        ("sraven", changed(PUZZLE, 2, 2, value=[0, 1, 2]), "set it to None"),
        ("sraven", changed(PUZZLE, 0, 1, value=None), "row 1, column 2 is missing"),
        ("sraven", changed(PUZZLE, 1, 0, value=[0, 1]), "row 2, column 1 must hold 3 features"),
        ("sraven", changed(PUZZLE, 1, 0, value=[0, 1, 2, 3]), "row 2, column 1 must hold 3 features"),
        ("sraven", changed(PUZZLE, 2, 0, value=7), "row 3, column 1 must hold 3 features"),
        ("sraven", changed(PUZZLE, 0, 0, 2, value=5), "integers in 0 to 4"),
        ("sraven", changed(PUZZLE, 0, 0, 2, value=-1), "integers in 0 to 4"),
        ("sraven", changed(PUZZLE, 0, 0, 2, value=1.5), "integers in 0 to 4"),
        ("sraven", changed(PUZZLE, 0, 0, 2, value=math.nan), "integers in 0 to 4"),
        ("sraven", changed(PUZZLE, 0, 0, 2, value=True), "integers in 0 to 4"),
        ("sraven", changed(PUZZLE, 0, 0, 2, value=None), "integers in 0 to 4"),
        ("logic", TABLE[-1:], "2 or more rows of 4 numbers"),
        ("logic", [TABLE[5], *TABLE[1:]], "only the last row's value may be None"),
        ("logic", TABLE[:1] * 3 + TABLE, "at most 6 rows, got 9"),
        ("logic", changed(TABLE, 3, value=[0.1, 0.2, 0.3]), "2 or more rows of 4 numbers"),
        ("logic", changed(TABLE, 3, value=[0.1] * 5), "2 or more rows of 4 numbers"),
        ("logic", {}, "2 or more rows of 4 numbers"),
        ("logic", {"input_values": [[0.5]]}, "2 or more rows of 4 numbers"),
        ("logic", changed(TABLE, 5, 3, value=0.0), "set it to None"),
        ("logic", changed(TABLE, 2, 3, value=None), "Row 3 of the truth table"),
        ("logic", changed(TABLE, 2, 0, value=math.nan), "Row 3 of the truth table"),
        ("logic", changed(TABLE, 2, 0, value=math.inf), "Row 3 of the truth table"),
        ("logic", changed(TABLE, 2, 0, value=1.01), "numbers in 0 to 1, got 1.01"),
        ("logic", changed(TABLE, 2, 0, value="x"), "numbers in 0 to 1, got 'x'"),
    ],
)
def test_an_invalid_puzzle_is_refused_before_any_work(monkeypatch, task, bad, message):
    pipe = pipeline("symbolic-reasoning", model=make(TASKS[task]), device="cpu")
    monkeypatch.setattr(pipe, "_forward", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=message) as refused:
        pipe(bad)
    assert "\n" not in str(refused.value)
    good = PUZZLE if task == "sraven" else TABLE
    if not isinstance(bad, dict):
        with pytest.raises(ValueError, match="Input 1: "):
            pipe([good, bad])


def test_tables_of_different_lengths_are_answered_one_by_one_and_refused_in_a_batch():
    pipe = pipeline("symbolic-reasoning", model=make(TASKS["logic"]), device="cpu")
    tables = [TABLE, TABLE[1:]]
    assert pipe(tables) == [pipe(table) for table in tables]
    with pytest.raises(ValueError, match="leave batch_size at 1"):
        pipe(tables, batch_size=2)


@pytest.mark.parametrize(
    "model",
    [
        HylaModel(HylaConfig(num_hidden_layers=1)),
        HylaForSequenceClassification(HylaConfig(num_hidden_layers=1, answer_token_id=None)),
        HylaForSequenceClassification(HylaConfig(num_hidden_layers=1, num_labels=3)),
        HylaForSequenceClassification(HylaConfig(num_hidden_layers=1, vocab_size=None, input_size=4, num_labels=1)),
    ],
)
def test_models_for_other_tasks_are_refused(model):
    with pytest.raises(ValueError, match="is neither"):
        pipeline("symbolic-reasoning", model=model)
