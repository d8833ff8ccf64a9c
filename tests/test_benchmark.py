"""Tests of the benchmark at tiny sizes: its output, its records, and its checks of what it times."""

import json
import os
import re
import statistics
import subprocess
import sys

import pytest
import torch

from hf_hyla import HylaForSequenceClassification
from hf_hyla import benchmark as bench
from hf_hyla.benchmark import Shape, as_table, attention, benchmark, inference, steps
from hf_hyla.cli import main
from hf_hyla.model.backends_hyla import BACKENDS
from hf_hyla.model.pipeline_hyla import SymbolicReasoningPipeline
from hf_hyla.runs.plots import length_curves
from hf_hyla.training import load_recipe


TINY = {
    "model.num_hidden_layers": "1",
    "model.hidden_size": "16",
    "model.intermediate_size": "16",
}
SIZES = {"shapes": (Shape(3, 37, 5, 2),), "lengths": (17, 30), "overrides": TINY, "batch_size": 4, "repeats": 3}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = "hyla_triton" if torch.cuda.is_available() else "hyla_cpu"
BACKEND_SUBJECTS = ["eager", "chunked", "fused", "sdpa", "sdpa, fixed bias"]


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:  # by a backend that takes no minutes and no C++ compiler
        compiled = torch.compile
        patch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
        measured = benchmark(threads=1, **SIZES)
    return json.loads(json.dumps(measured))


def test_every_part_of_the_benchmark_has_its_rows(result):
    works = {}
    for row in result["rows"]:
        works.setdefault((row["part"], row["work"], row.get("shape")), []).append(row["subject"])
    shapes = ["3 x 37 x 5 heads x 2", "1 x 17 x 8 heads x 16", "1 x 30 x 8 heads x 16"]
    for shape in shapes:
        for work in ("forward", "forward + backward"):
            assert works.pop(("attention", work, f"{shape}, float32"))[:5] == BACKEND_SUBJECTS
    for task in ("sraven", "logic"):
        subjects = works.pop((task, "training step of 4", None))
        assert subjects[:4] == ["eager", "eager, answers only", "hyla", "softmax"]
        assert subjects[4] == "hyla, compiled" and subjects[-2:] == ["matrix products", "at the rate of 1024"]
        assert works.pop(("data", f"{task}, batch of 4", None)) == ["training step", "sequential", "shuffled"]
        for batch in (1, 1024):
            assert works.pop(("inference", f"{task}, batch of {batch}, 1 thread", None)) == ["model", "pipeline"]
    assert not torch.cuda.is_available() or works.pop(("attention", "forward", str(bench.FLASH_SHAPE)))
    assert torch.cuda.is_available() or not works


def test_the_record_holds_hardware_versions_and_settings(result):
    assert result["threads"] == result["hardware"]["threads"] == 1 and result["repeats"] == 3 and result["seed"] == 0
    assert "git_commit" in result["environment"] and result["schema_version"] == 2
    assert result["skipped"] == result["failed"] == []
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["repeats"] >= 3
        if row["quartiles"]:
            assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]


def test_ratios_follow_from_the_times(result):
    works = {}
    for row in result["rows"]:
        works.setdefault((row["part"], row["work"], row.get("shape")), {})[row["subject"]] = row
    for rows in works.values():
        for row in rows.values():
            for other, ratio in row["ratios"].items():
                assert ratio == pytest.approx(row["seconds"] / rows[other]["seconds"])
    (step,) = (rows for (part, *_), rows in works.items() if part == "sraven")
    assert set(step["hyla"]["ratios"]) == {
        "eager",
        "eager, answers only",
        "hyla",
        "softmax",
        "matrix products",
        "at the rate of 1024",
    }


def test_steps_of_one_recipe_keep_their_attn_implementations(tmp_path):
    recipe = load_recipe("recipes/logic/hyla.yaml", TINY)
    asked = ["hyla", "eager", "hyla_chunked"]
    made = [steps._TrainingStep(recipe, name, folder=str(tmp_path), batch_size=4) for name in asked]
    assert [step._model.config._attn_implementation for step in made] == asked
    assert [step._model.model.layers[0].self_attn.config._attn_implementation for step in made] == asked


def test_the_table_shows_every_row(result):
    table = as_table(result)
    assert table.count(" ms ") == len(result["rows"]) and "1 threads" in table
    row = next(row for row in result["rows"] if row["subject"] == "fused")
    assert f"{1e3 * row['seconds']:.2f} ms" in table and f"{row['ratios']['eager']:.3f} x eager" in table


def test_medians_and_quartiles_are_of_the_measured_times(monkeypatch):
    times = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0, 5.0, 50.0, 4.0, 40.0])
    meter = bench.Meter(torch.device("cpu"), repeats=5, say=lambda line: None)
    monkeypatch.setattr(meter, "_seconds", lambda work: next(times))
    meter.compare(
        {"a": lambda: None, "b": lambda: None}, against=("a",), factors={"b": 2.0}, facts={"part": "x", "work": "y"}
    )
    one, other = meter.rows
    assert one["seconds"] == statistics.median([1, 3, 2, 5, 4]) and one["quartiles"] == [2.0, 4.0]
    assert other["seconds"] == 60.0 and other["ratios"] == {"a": 20.0}


@pytest.mark.parametrize("quantity", ["output", "query", "key", "value", "position_bias", "nan"])
def test_a_wrong_backend_is_not_timed(monkeypatch, quantity):
    right = BACKENDS[FUSED]

    def wrong(module, query, key, value, mask, position_bias=None, **kwargs):
        tensors = {"query": query, "key": key, "value": value, "position_bias": position_bias}
        if quantity in tensors:  # the same numbers, but a gradient that is 0.1 % too large
            tensors[quantity] = 1.001 * tensors[quantity] - 0.001 * tensors[quantity].detach()
        output, codes = right(
            module, *list(tensors.values())[:3], mask, position_bias=tensors["position_bias"], **kwargs
        )
        return output * {"output": 1.0001, "nan": float("nan")}.get(quantity, 1.0), codes

    monkeypatch.setitem(BACKENDS, FUSED, wrong)
    named = "output" if quantity in ("output", "nan") else f"gradient of the {quantity}"
    meter = measured(Shape(3, 37, 5, 2))
    assert [row["subject"] for row in meter.rows] == 2 * ["eager", "chunked", "sdpa", "sdpa, fixed bias"]
    (sentence,) = meter.failed
    assert re.match(f"fused does not compute what it should on 3 x 37.*its {named} is off by", sentence)


def measured(shape):
    meter = bench.Meter(DEVICE, repeats=1, say=lambda line: None)
    attention.measure_attention(meter, shape)
    return meter


def test_only_a_backend_that_cannot_be_launched_is_not_timed(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory\nReducing block sizes may help.")

    monkeypatch.setitem(BACKENDS, FUSED, broken)
    meter = measured(Shape(3, 37, 5, 2))
    assert [row["subject"] for row in meter.rows] == 2 * ["eager", "chunked", "sdpa", "sdpa, fixed bias"]
    assert "it cannot be run (RuntimeError: out of resource: shared memory), so its speed is not" in meter.failed[0]


def test_softmax_attention_is_checked_at_the_whole_length(monkeypatch):
    def wrong_from_the_fiftieth_on(*args, **kwargs):
        output, codes = BACKENDS["eager"](*args, **kwargs)
        return torch.cat([output[:, :50], 2 * output[:, 50:]], dim=1), codes

    monkeypatch.setitem(BACKENDS, "hyla_sdpa", wrong_from_the_fiftieth_on)
    meter = measured(Shape(1, 60, 5, 2))
    assert [sentence.partition(" does not")[0] for sentence in meter.failed] == ["sdpa", "sdpa, fixed bias"]


@pytest.mark.parametrize("error", [1.0, 2.0])
def test_half_precision_may_have_only_the_errors_of_the_eager_implementation(monkeypatch, error):
    """The chunked implementation here is the eager one, its rounding errors multiplied."""

    def worse(module, query, key, value, *args, **kwargs):
        found = BACKENDS["eager"](module, query, key, value, *args, **kwargs)[0]
        kwargs["position_bias"] = kwargs["position_bias"].double()
        exact = BACKENDS["eager"](module, query.double(), key.double(), value.double(), *args, **kwargs)[0]
        return exact + error * (found - exact), None

    monkeypatch.setitem(BACKENDS, "hyla_chunked", worse)
    # Such wide heads take long to compile for, and nothing here is said of the kernel.
    monkeypatch.setattr(attention, "kernel_problem", lambda *tensors, **others: "not needed here")
    meter = measured(Shape(1, 64, 16, 64, torch.bfloat16))
    assert any(sentence.startswith("chunked") for sentence in meter.failed) == (error > 1.5)
    assert not any(sentence.startswith(("eager", "sdpa")) for sentence in meter.failed)


def test_without_the_fused_kernel_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(attention, "kernel_problem", lambda *tensors, **others: "numba is not installed")
    meter = measured(Shape(3, 37, 5, 2))
    assert [row["subject"] for row in meter.rows] == 2 * ["eager", "chunked", "sdpa", "sdpa, fixed bias"]
    assert meter.skipped == ["attention, 3 x 37 x 5 heads x 2, float32, fused: numba is not installed."]


def test_what_needs_more_than_half_of_the_memory_is_left_out(monkeypatch):
    shape = Shape(3, 37, 5, 2)
    # Eager attention takes more than a bias by pair, so the first of these limits leaves it out alone.
    free = {"eager": 2 * shape.bias_bytes, "both": 2 * shape.bias_bytes - 2}
    left = {"eager": ["chunked", "fused", "sdpa", "sdpa, fixed bias"], "both": ["chunked", "fused"]}
    for what, available in free.items():
        monkeypatch.setattr(attention, "available_bytes", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda available=available: (available, available))
        meter = measured(shape)
        assert [row["subject"] for row in meter.rows] == 2 * left[what]
        assert len(meter.skipped) == (1 if what == "eager" else 2)
        assert all("more than half of the" in sentence for sentence in meter.skipped)


def test_the_recipes_of_the_package_are_measured_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/logic").mkdir(parents=True)
    (tmp_path / "recipes/logic/hyla.yaml").write_text("not a recipe")
    meter = bench.Meter(DEVICE, repeats=1, say=lambda line: None)
    steps.measure_data(meter, "logic", 4, TINY)
    inference.measure_inference(meter, "logic", 1, TINY)
    assert {row["part"] for row in meter.rows} == {"data", "inference"}


def test_without_a_compiler_the_other_steps_are_measured(monkeypatch):
    def without_compiler(model, **kwargs):
        def broken(**batch):
            raise RuntimeError("No working C++ compiler found.\nDetails follow.")

        return broken

    monkeypatch.setattr(torch, "compile", without_compiler)
    meter = bench.Meter(DEVICE, repeats=1, say=lambda line: None)
    steps.measure_steps(meter, "logic", 4, TINY)
    assert [row["subject"] for row in meter.rows] == [
        "eager",
        "eager, answers only",
        "hyla",
        "softmax",
        "matrix products",
        "at the rate of 1024",
    ]
    assert meter.skipped[0] == "logic, hyla, compiled: RuntimeError: No working C++ compiler found."


def test_a_workload_that_fails_loses_only_its_own_row():
    meter = bench.Meter(DEVICE, repeats=1, say=lambda line: None)
    works = {"good": lambda: None, "broken": lambda: torch.zeros(2) + torch.zeros(3)}
    assert list(meter.compare(works, against=("broken", "good"), facts={"part": "x", "work": "y"})) == ["good"]
    assert meter.failed[0].startswith("x, y: broken cannot be run (RuntimeError: The size of tensor a (2)")


def test_results_so_far_are_saved_before_an_interruption(monkeypatch):
    def gone(*args):
        raise KeyboardInterrupt

    saved = []
    monkeypatch.setattr(bench, "measure_inference", gone)
    monkeypatch.setattr(bench, "FLASH_SHAPE", SIZES["shapes"][0])
    with pytest.raises(KeyboardInterrupt):
        benchmark(**SIZES | {"repeats": 1}, save=lambda result: saved.append(json.dumps(result)))
    shapes = [{row["shape"] for row in json.loads(text)["rows"]} for text in saved]
    assert [len(names) for names in shapes] == [1, 2, 3]


def test_the_definition_computed_in_parts_equals_the_whole(monkeypatch):
    shape = Shape(5, 23, 4, 3)
    layer, inputs = attention._layer(shape, "hyla"), attention._inputs(shape, torch.device("cpu"))
    wide = {name: tensor.detach().double().requires_grad_(name != "gradient") for name, tensor in inputs.items()}
    whole = attention._differentiated(BACKENDS["eager"], layer, wide)
    for block in (1, 23 * 4 * 7, 23 * 4 * 23 * 2):  # single queries, parts of a sequence, two sequences
        monkeypatch.setattr(attention, "_BLOCK", block)
        parts = attention._definition(layer, inputs)
        assert parts.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-11)


def test_lengths_that_would_not_fit_are_left_out_and_named(monkeypatch):
    monkeypatch.setattr(attention, "available_bytes", lambda: 2 * Shape(1, 17, 8, 16).eager_bytes)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2 * Shape(1, 17, 8, 16).eager_bytes, 0))
    monkeypatch.setattr(bench, "FLASH_SHAPE", Shape(1, 30, 8, 16))
    result = benchmark(("attention",), **SIZES | {"shapes": ()})
    assert {row["length"] for row in result["rows"] if row["subject"] == "eager"} == {17}
    assert {row["length"] for row in result["rows"] if row["subject"] == "fused"} == {17, 30}
    assert "1 x 30 x 8 heads x 16, float32, eager: it needs" in result["skipped"][0]
    assert result["skipped"][0] in as_table(result)
    monkeypatch.setattr(bench, "FLASH_SHAPE", Shape(1, 30, 8, 16, torch.bfloat16))
    result = benchmark(("attention",), **SIZES | {"shapes": ()})
    assert not any("bfloat16" in row["shape"] for row in result["rows"])


@pytest.mark.skipif(not torch.cuda.is_available() and sys.platform != "linux", reason="memory cannot be read here")
def test_peak_memory_counts_only_what_a_workload_adds():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = bench.Meter(device, repeats=1, say=lambda line: None)
    kept = torch.ones(2**24, device=device)
    peak = meter._peak_bytes(lambda: torch.ones(2**23, device=device) + kept[: 2**23])
    assert 60 * 2**20 < peak < 80 * 2**20  # two of 32 MiB
    assert meter._peak_bytes(lambda: None) < 4 * 2**20


def test_eager_attention_for_answers_only_gives_the_same_loss(tmp_path):
    recipe = load_recipe("recipes/sraven/hyla.yaml", TINY | {"model.attention_dropout": "0.0"})
    losses, widths = [], []
    for answers_only in (False, True):
        step = steps._TrainingStep(recipe, "eager", folder=str(tmp_path), batch_size=4, answers_only=answers_only)
        step._uncompiled.model.norm.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
        losses.append(step._uncompiled(**step._batch()).loss)
    torch.testing.assert_close(*losses)
    assert widths == [36, 4]


@pytest.mark.parametrize("task", ["sraven", "logic"])
def test_model_and_pipeline_answer_the_same_questions(task):
    recipe = load_recipe(f"recipes/{task}/hyla.yaml", TINY)
    model = HylaForSequenceClassification(recipe.config).eval()
    inputs, questions = inference._inputs(recipe, 3)
    found = SymbolicReasoningPipeline(model=model)(questions, batch_size=3)
    logits = model(**inputs).logits
    answers = logits.argmax(-1).tolist() if task == "sraven" else logits[:, 0].tolist()
    assert [result["answer"] for result in found] == (answers if task == "sraven" else pytest.approx(answers))


def test_answers_per_second_are_measured_on_one_and_two_threads_and_the_number_is_restored(monkeypatch):
    before, asked = torch.get_num_threads(), []
    monkeypatch.setattr(
        bench, "measure_inference", lambda meter, task, threads, overrides: asked.append((task, threads))
    )
    benchmark(("inference",), **SIZES)
    many = [1, 2] if DEVICE.type == "cpu" else [before]
    assert asked == [(task, threads) for task in ("sraven", "logic") for threads in many]
    monkeypatch.setattr(inference, "BATCHES", (2,))
    meter = bench.Meter(DEVICE, repeats=1, say=lambda line: None)
    inference.measure_inference(meter, "sraven", 2, TINY)
    assert torch.get_num_threads() == before
    assert [row["work"] for row in meter.rows] == 2 * ["sraven, batch of 2, 2 threads"]
    assert all(row["samples_per_second"] == pytest.approx(2 / row["seconds"]) for row in meter.rows)


def test_curves_are_drawn_from_rows_with_a_length(result):
    pytest.importorskip("matplotlib")
    assert length_curves(result["rows"]).startswith(b"\x89PNG")
    assert length_curves([row for row in result["rows"] if "length" not in row]) is None


def test_the_command_prints_either_json_or_a_table(monkeypatch, result, tmp_path, capsys):
    asked = []

    def measured_before(*args, **kwargs):
        asked.append((args, kwargs))
        kwargs["save"](result)
        return result

    monkeypatch.setattr(bench, "benchmark", measured_before)
    assert main(["bench", "--task", "data", "--threads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert asked[0][0] == (("data",),) and asked[0][1]["threads"] == 2
    file, folder = tmp_path / "new" / "x.json", tmp_path / "pictures"
    assert main(["bench", "--json", str(file), "--output", str(folder)]) == 0
    assert capsys.readouterr().out == as_table(result) + "\n"
    assert json.loads(file.read_text()) == json.loads((folder / "bench.json").read_text()) == result


def test_the_command_reports_failures_at_the_end(monkeypatch, result, capsys):
    monkeypatch.setattr(bench, "benchmark", lambda *args, **kwargs: result | {"failed": ["fused is wrong."]})
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "hyla: fused is wrong.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "logik"], "did you mean 'logic'?"),
        (["--threads", "0"], "--threads must be an integer of at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be an integer of at least 1, got 0"),
        (["--lengths", "0"], "--lengths must be an integer of at least 1, got 0"),
        (["--json", "/"], "--json must name a file, but / is a folder"),
        (["--against", "HEAD", "--task", "logic"], "--task cannot be used with --against"),
        (["--bf16"], "--bf16 belongs to --against COMMIT_OR_FOLDER"),
        (["--recipe", "sraven/hyla"], "--recipe belongs to --against COMMIT_OR_FOLDER"),
        (["--against", "HEAD", "--recipe", "nosuch"], "There is no recipe nosuch"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_script_for_gpus_keeps_no_large_files_and_removes_only_its_own(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    own = out / "mine" / "thesis.bin"
    for path in (run / "model.safetensors", run / "run.json", own):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(17 * 2**20 if path.suffix != ".json" else 2)
    env = os.environ | {"OUT": str(out), "RUN": str(run), "PARTS": "bench", "PYTHON": "true"}
    result = subprocess.run(["recipes/gpu.sh"], env=env, capture_output=True, text=True)
    assert result.returncode == 1 and "model.safetensors is over 16 MiB and removed." in result.stdout
    assert "bench: done" in result.stdout
    assert {path.name for path in out.rglob("*")} == {"mine", "thesis.bin", "run.json", "report.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ("sravn",)}, "parts must be one of .*did you mean 'sraven'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark(**arguments)
