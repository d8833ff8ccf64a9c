"""Tests of the documents: snippets run, commands are valid, and numbers come from committed records."""

import contextlib
import io
import itertools
import json
import random
import re
import shlex
import statistics
import tomllib
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hf_hyla.cli import main, parse
from hf_hyla.runs.paper import paper_result
from hf_hyla.training import load_recipe
from hf_hyla.training.sweep import load_sweep


PROJECT = Path(__file__).parents[1]
DOCUMENTS = {
    name: (PROJECT / name).read_text()
    for name in ("README.md", "hub_cards/README.md", "recipes/README.md", "recipes/accelerate/README.md")
}
README, RECIPES = DOCUMENTS["README.md"], DOCUMENTS["recipes/README.md"]
# A python block, and the text block that shows what it prints.
SNIPPETS = [
    found
    for text in DOCUMENTS.values()
    for found in re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
]
# The lines of bash blocks that call this project's commands.
LINES = [
    line
    for text in DOCUMENTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"hyla|python|accelerate", line)
]
RESULTS = sorted([
    *(PROJECT / "recipes" / "results").glob("*/*.json"),
    PROJECT / "recipes" / "results" / "sraven-ideal-observer.json",
    *PROJECT.glob("hub_cards/*/probe/probe.json"),
])  # fmt: skip


def test_every_python_snippet_shows_its_output():
    assert len(SNIPPETS) == sum(text.count("```python") for text in DOCUMENTS.values()) > 0


@pytest.mark.parametrize(("code", "shown"), SNIPPETS)
def test_snippets_print_the_output_that_is_shown(code, shown):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_the_badges_say_what_the_package_declares():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needs = dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"])
    declared = {
        "Python": project["requires-python"],
        "transformers": needs["transformers"],
        "torch": needs["torch"],
        "license": project["license"],
    }
    image = ElementTree.parse(PROJECT / "hub_cards" / "badges.svg")
    texts = [element.text for element in image.iter("{http://www.w3.org/2000/svg}text")]
    assert dict(zip(texts[::2], texts[1::2], strict=True)) == declared
    title = ", ".join(map(" ".join, declared.items()))
    assert image.findtext("{http://www.w3.org/2000/svg}title") == title
    assert f"![{title}](hub_cards/badges.svg)" in README


def test_the_first_commands_are_those_that_a_release_is_checked_by():
    installation, *first = re.search(r"```bash\n(.*?)```", README, flags=re.DOTALL)[1].splitlines()
    assert installation.startswith("pip install ")
    checked = re.findall(r"^run (.*)$", (PROJECT / ".ci" / "first-minute").read_text(), flags=re.MULTILINE)
    assert checked == ["hyla --version", *(line.partition("#")[0].rstrip() for line in first)]


@pytest.mark.parametrize("line", LINES)
def test_commands_are_valid_and_name_existing_files(line):
    words = shlex.split(line, comments=True)
    if words[0] != "python":
        parse(words[1 + words.index("hyla" if "hyla" in words else "hf_hyla") :])
    assert all(list(PROJECT.glob(word)) for word in words if word.startswith("recipes/"))


def record_of(recipe, seed=0):
    return json.loads((PROJECT / "recipes" / "results" / recipe / f"{seed}.json").read_text())


def row_of(text, title):
    """The cells of the row of a Markdown table that begins with this title."""
    [row] = re.findall(rf"^\| {re.escape(title)} \| (.*) \|$", text, flags=re.MULTILINE)
    return row.split(" | ")


def test_the_demos_scores_come_from_its_committed_record():
    record = record_of("logic-demo")
    for split, scores in record["metrics"].items():
        assert f"{split:<15}{scores['r2']:>18.4f}" in README
    assert f"{record['samples_seen']:,} training samples" in README
    assert f"{record['seconds'] / 60:.1f} minutes of training" in README
    softmax = record_of("logic-demo-attention_type=softmax")["metrics"]
    for split in ("test", "ood"):
        assert f"{softmax[split]['r2']:.4f} on `{split}`" in README


def test_the_table_of_results_is_what_the_command_prints(capsys):
    main(["compare", str(PROJECT / "recipes" / "results")])
    assert f"$ hyla compare recipes/results\n{capsys.readouterr().out}```" in README


def test_the_rows_of_table_a1_equal_the_sweeps_points_the_papers_values_and_the_records():
    rows = re.findall(r"^\| \d+ \| [^|]* \| `(.*)` \| (.*) \| (.*) \| (.*) \|$", RECIPES, flags=re.MULTILINE)
    folders = ("logic-softmax", "logic-linear", "logic-hyla", "logic-table-a1")
    records = [
        json.loads(path.read_text())
        for folder in folders
        for path in (PROJECT / "recipes" / "results" / folder).glob("*.json")
    ]
    assert {record["steps"] for record in records} == {50_000}
    for column, task in ((1, "logic"), (3, "sraven")):
        points = [p.recipe for p in load_sweep(f"figures/{task}-table-a1").points if p.recipe.task.seed == 0]
        assert len(points) == len(rows) == len({paper_result(point.settings) for point in points}) == 13
        for point, row in zip(points, rows, strict=True):
            base = load_recipe(
                f"{task}/hyla", {f"model.{k}": v for k, v in (x.split(": ") for x in row[0].split(", "))}
            )
            assert point.config.to_dict() == base.config.to_dict()
            paper = paper_result(point.settings)
            assert row[column] == f"{paper.mean:.4f} ± {paper.standard_error:.4f}"
            if task == "logic":
                here = [r["metrics"]["ood"]["r2"] for r in records if paper_result(r["recipe"]) == paper]
                error = f" ± {statistics.stdev(here) / len(here) ** 0.5:.4f}" if len(here) > 1 else ""
                assert row[2] == (f"{statistics.fmean(here):.4f}{error} ({len(here)})" if here else "-")
    of_seed_0 = record_of("logic-hyla")["metrics"]["ood"]["r2"]
    assert f"Rows with one seed have seed 0, where HYLA has {of_seed_0:.4f}." in RECIPES


def test_the_table_of_trials_comes_from_their_records():
    records = {
        path.stem: json.loads(path.read_text()) for path in (PROJECT / "recipes/results/sraven-muon-trials").glob("*")
    }
    found = [
        (f"{record['steps']:,}", *(f"{record['metrics'][split]['accuracy']:.4f}" for split in ("ood", "test")))
        for record in records.values()
    ]
    section = RECIPES.partition("### Trials with Muon on SRAVEN")[2].partition("###")[0]
    of_sweep = [record for record in records.values() if record["steps"] == 8000]
    of_sweep = [record for record in of_sweep if not record["recipe"]["trainer"].get("bf16")]
    assert f"{len(of_sweep)} of the 33 have been run" in " ".join(section.split())
    row = r"^\| [^|]* \| [^|]* \| ([\d,]+) \| (0\.\d+) \| (0\.\d+) \|$"
    assert sorted(re.findall(row, section, flags=re.MULTILINE)) == sorted(found) != []


def test_the_table_of_muon_on_sraven_comes_from_its_records():
    names = {"hyla": "HYLA", "softmax": "softmax attention", "linear": "linear attention"}
    for kind, title in names.items():
        cells = []
        for folder, seed in [
            *((f"sraven-{kind}-muon-max_steps=40000", seed) for seed in range(3)),
            (f"sraven-{kind}-muon", 0),
        ]:
            path = PROJECT / "recipes" / "results" / folder / f"{seed}.json"
            found = json.loads(path.read_text())["metrics"]["ood"]["accuracy"] if path.exists() else None
            cells.append("-" if found is None else f"{found:.4f}")
        assert f"| {title} | {' | '.join(cells)} |" in RECIPES


def test_the_plateaus_and_the_climb_at_the_papers_budget_come_from_the_records():
    record = record_of("sraven-hyla-muon")
    ood = {point["step"]: point["ood/accuracy"] for point in record["curve"] if "ood/accuracy" in point}
    plateau = [score for step, score in ood.items() if 3e6 <= 128 * step <= 11.3e6]
    text = " ".join(RECIPES.split())
    assert f"stays between {min(plateau):.2f} and {max(plateau):.2f} on `ood` from 3 to 11 million samples" in text
    assert (
        f"climbs to {ood[91_000]:.2f} in 3,000 steps, and ends at {record['metrics']['ood']['accuracy']:.4f}" in text
    )
    softmax = [
        point["ood/accuracy"]
        for point in record_of("sraven-softmax-muon")["curve"]
        if "ood/accuracy" in point and 128 * point["step"] >= 8e6
    ]
    assert f"stays between {min(softmax):.2f} and {max(softmax):.2f} from 8 million samples to the end" in text


def test_the_tables_of_muon_on_fuzzy_logic_come_from_their_records():
    section = RECIPES.partition("### Muon on fuzzy logic")[2].partition("###")[0]
    trials = [json.loads(path.read_text()) for path in (PROJECT / "recipes/results/logic-muon-trials").glob("*")]
    found = [
        (str(t["recipe"]["trainer"]["muon_learning_rate"]), *(f"{t['metrics'][s]['r2']:.4f}" for s in ("ood", "test")))
        for t in trials
    ]
    row = r"^\| [^|]* \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| (0\.\d+) \| (0\.\d+) \|$"
    assert sorted(re.findall(row, section, flags=re.MULTILINE)) == sorted(found) != []
    names = {"hyla": "HYLA", "softmax": "softmax attention", "linear": "linear attention"}
    for kind, title in names.items():
        cells = []
        for folder in ("logic-hyla-muon" + f"-attention_type={kind}" * (kind != "hyla"), f"logic-{kind}"):
            paths = (PROJECT / "recipes/results" / folder).glob("*.json")
            r2 = [json.loads(path.read_text())["metrics"]["ood"]["r2"] for path in paths]
            error = f" ± {statistics.stdev(r2) / len(r2) ** 0.5:.4f}" if len(r2) > 1 else ""
            cells.append(f"{statistics.fmean(r2):.4f}{error} ({len(r2)})")
        assert row_of(section.partition("The rates come")[0], title) == cells


def test_the_table_of_language_models_comes_from_their_records():
    results = PROJECT / "recipes" / "results"
    names = {"hyla": "HYLA", "softmax": "softmax attention", "linear": "linear attention"}
    section = RECIPES.partition("### Results on the standard library")[2].partition("## ")[0]
    for kind, title in names.items():
        record = record_of(f"text-{kind}")
        probes = json.loads((results / "text-codes" / f"text-{kind}.json").read_text())
        scores = {source: of["f1"] for source, of in probes["scores"].items()}
        shown = {
            source: f"{scores[source]['value']:.3f} ± {scores[source]['standard_error']:.3f}"
            for source in ("two bytes", "all layers")
        }
        found = [f"{record['metrics']['test'][name]:.4f}" for name in ("bits_per_byte", "perplexity")]
        assert row_of(section, title) == [*found, shown["all layers"]]
        assert f"alone give {shown['two bytes']}" in " ".join(section.split())
        assert probes["weights"] == record["digests"]["model.safetensors"]
    hyla, softmax, linear = (record_of(f"text-{kind}")["metrics"]["test"]["bits_per_byte"] for kind in names)
    better, worse = f"{linear - hyla:.2f} bits better than linear", f"{hyla - softmax:.2f} worse than softmax"
    assert better in section and worse in section


def test_the_means_in_bfloat16_come_from_their_records():
    for folder, metric in {"sraven-bf16": "accuracy", "logic-demo-bf16": "r2"}.items():
        shown = []
        for bf16 in (True, False):
            paths = sorted((PROJECT / "recipes/results" / folder).glob(f"bf16={bf16}-*.json"))
            records = [json.loads(path.read_text()) for path in paths]
            assert [record["seeds"]["trainer"] for record in records] == [0, 1, 2]
            assert {record["recipe"]["trainer"].get("bf16", False) for record in records} == {bf16}
            scores = [record["metrics"]["ood"][metric] for record in records]
            shown.append(f"{statistics.fmean(scores):.4f} ± {statistics.stdev(scores) / len(scores) ** 0.5:.4f}")
        assert f" | {' | '.join(shown)} | `results/{folder}/` |" in RECIPES


def test_how_little_a_trial_tells_comes_from_the_records_of_one_recipe_and_seed():
    on_cpu = record_of("sraven-muon-trials", "hyla-attention_dropout=0.0-attention_out_multiplier=0.03125")
    on_gpu = record_of("sraven-bf16", "bf16=False-0")
    assert on_cpu["seeds"] == on_gpu["seeds"] and on_cpu["data_fingerprint"] == on_gpu["data_fingerprint"]
    long = [record_of("sraven-hyla-muon-max_steps=40000", seed) for seed in range(3)]
    plain = record_of("sraven-muon-trials", "hyla-max_steps=40000")
    cpu, gpu, least, most, without = (
        f"{score:.4f}"
        for score in [
            *(record["metrics"]["ood"]["accuracy"] for record in (on_cpu, on_gpu)),
            *(choose(record["metrics"]["ood"]["accuracy"] for record in long) for choose in (min, max)),
            plain["metrics"]["ood"]["accuracy"],
        ]
    )
    text = " ".join(RECIPES.split())
    assert f"reached {cpu} on a CPU. The same seed ended at {gpu} on an H100" in text
    assert f"reach {least} to {most}. The only run without the multiplier has dropout, and reaches {without}." in text


def test_the_effect_of_held_out_draws_comes_from_the_committed_scores_by_combination():
    found = json.loads((PROJECT / "recipes" / "results" / "logic-by-combination" / "softmax.json").read_text())
    by_rarest = {}
    for one in found["combinations"]:
        by_rarest.setdefault(min(one["trained"]), []).append(one["scores"]["r2"])
    mean = {times: statistics.fmean(scores) for times, scores in by_rarest.items()}
    assert row_of(RECIPES, "trained combinations that hold the rarer term") == [str(times) for times in sorted(mean)]
    assert row_of(RECIPES, "mean R²") == [f"{mean[times]:.2f}" for times in sorted(mean)]

    terms, draw = range(12), random.Random(0)
    combinations = list(itertools.combinations(terms, 2))
    draws, lacking = [], 0
    for _ in range(2000):
        held_out = set(draw.sample(combinations, 46))
        times = Counter(term for one in combinations if one not in held_out for term in one)
        if len(times) < len(terms):
            lacking += 1
            continue
        draws.append(statistics.fmean(mean[min(4, *(times[term] for term in one))] for one in held_out))
    assert re.search(rf"standard deviation of only {statistics.stdev(draws):.2f}\.", RECIPES)
    assert f"draw in {round(2000 / lacking)} leaves a term untrained" in RECIPES


def test_the_scores_on_the_papers_own_draws_come_from_committed_records():
    def ood(recipe, seed):
        return record_of(recipe, seed)["metrics"]["ood"]["r2"]

    columns = []
    for attention in ("hyla", "softmax"):
        path = PROJECT / "recipes" / "results" / "logic-by-combination" / f"{attention}-reference-split-2.json"
        found = json.loads(path.read_text())["combinations"]
        lacking, others = (
            [c["scores"]["r2"] for c in found if (min(c["trained"]) == 0) is lacks] for lacks in (True, False)
        )
        scores = [ood(f"logic-{attention}-reference_split=True", seed) for seed in range(3)]
        mean, error = statistics.fmean(scores), statistics.stdev(scores) / 3**0.5
        paper = paper_result(load_recipe("logic/hyla", {"model.attention_type": attention}).settings)
        columns.append({
            "the paper's draw of seed 2": f"{scores[2]:.4f}",
            f"its {len(lacking)} combinations with an untrained term": f"{statistics.fmean(lacking):.2f}",
            f"its {len(others)} other combinations": f"{statistics.fmean(others):.2f}",
            "mean over the paper's three draws": f"{mean:.4f} ± {error:.4f}",
            "the paper": f"{paper.mean:.4f} ± {paper.standard_error:.4f}",
            "difference, and its standard error":
                f"{mean - paper.mean:.2f} ± {(error**2 + paper.standard_error**2) ** 0.5:.2f}",
        })  # fmt: skip
    hyla, softmax = columns
    for title in hyla:
        assert row_of(RECIPES, title) == [hyla[title], softmax[title]]
    assert f"reaches {ood('logic-softmax-learning_rate=0.001', 0):.4f}." in RECIPES
    for seed in (0, 2):
        in_jax = json.loads((PROJECT / "recipes" / "results" / f"logic-in-jax-softmax-{seed}.json").read_text())
        ours = ood("logic-demo-attention_type=softmax-reference_split=True", seed)
        assert row_of(RECIPES, f"seed {seed}") == [f"{in_jax['curve'][-1]['ood']:.4f}", f"{ours:.4f}"]


def test_the_ideal_observers_accuracies_come_from_its_committed_record():
    record = json.loads((PROJECT / "recipes" / "results" / "sraven-ideal-observer.json").read_text())
    for title, score in (
        ("knows the rule combinations of the split", "accuracy"),
        ("takes every combination to be possible", "accuracy_all_combinations"),
    ):
        assert row_of(RECIPES, title) == [f"{record['splits'][split][score]:.4f}" for split in ("test", "ood")]


def test_the_maps_of_codes_that_documents_show_are_those_that_the_cards_show():
    shown = re.findall(r"\]\((?:hub_cards/)?([\w-]+)/(probe/map_[\w.]+)\)", README + DOCUMENTS["hub_cards/README.md"])
    assert len(shown) == 2
    for model, picture in shown:
        assert f"]({picture})" in (PROJECT / "hub_cards" / model / "README.md").read_text()


def test_the_probes_accuracies_come_from_the_committed_reports():
    columns = []
    for model in ("hyla", "softmax"):
        report = json.loads((PROJECT / "hub_cards" / f"{model}-sraven" / "probe" / "probe.json").read_text())
        [result] = [r for r in report["probes"] if (r["subject"], r["layer"]) == ("rule", None)]
        alone = report["answer_alone"]["rule"]["accuracy"]["value"]
        columns.append([result["scores"]["accuracy"]["value"], alone, result["chance"]["accuracy"]])
    titles = ("probes of the codes of all layers", "a probe of the right answer alone", "chance")
    for title, *scores in zip(titles, *columns, strict=True):
        assert row_of(DOCUMENTS["hub_cards/README.md"], title) == [f"{score:.2f}" for score in scores]


def test_the_pipelines_times_come_from_the_record():
    record = json.loads((PROJECT / "recipes" / "results" / "bench" / "cpu-inference.json").read_text())
    seconds = {row["work"]: row["seconds"] for row in record["rows"] if row["subject"] == "pipeline"}
    one, two, many, many_by_two = (
        seconds[f"sraven, batch of {batch}, {threads}"] for batch in (1, 1024) for threads in ("1 thread", "2 threads")
    )
    text = " ".join((PROJECT / "recipes" / "results" / "bench" / "README.md").read_text().split())
    assert f"{1e3 * one:.2f} ms through the pipeline with one thread and {1e3 * two:.2f} ms with two" in text
    assert f"1,024 puzzles take {many:.2f} s and {many_by_two:.2f} s" in text


def test_both_measures_of_a_steps_products_come_from_the_record():
    record = json.loads((PROJECT / "recipes" / "results" / "bench" / "cpu.json").read_text())
    [step] = [row for row in record["rows"] if (row["part"], row["subject"]) == ("sraven", "hyla")]
    products, rate = (step["ratios"][name] for name in ("matrix products", "at the rate of 1024"))
    text = " ".join((PROJECT / "recipes" / "results" / "bench" / "README.md").read_text().split())
    assert (
        f"takes {products:.2f} times as long as its matrix products, and {rate:.2f} times as long as at the rate"
        in text
    )


def ratios_of_speed_and_memory(*names):
    """What the README's table of speed shows, from records of `hyla bench` with attention and with steps on SRAVEN."""
    rows = []
    for name in names:
        record = json.loads((PROJECT / "recipes" / "results" / "bench" / f"{name}.json").read_text())
        assert record["failed"] == []
        rows.append(record["rows"])
    attention, step = rows[0], rows[-1]

    def hyla(shape, subject="fused"):
        key = ("attention", "forward + backward", f"{shape}, float32", subject)
        [found] = [row for row in attention if (row["part"], row["work"], row.get("shape"), row["subject"]) == key]
        return found

    puzzles, long, longest = "128 x 36 x 16 heads x 4", "1 x 1024 x 8 heads x 16", "1 x 4096 x 8 heads x 16"
    [sraven] = [row["ratios"] for row in step if (row["part"], row["subject"]) == ("sraven", "hyla")]
    ratios = [
        hyla(puzzles)["ratios"]["eager"],
        hyla(long)["ratios"]["sdpa"],
        hyla(long)["ratios"]["sdpa, fixed bias"],
        hyla(longest)["peak_bytes"] / hyla(longest, "eager")["peak_bytes"],
        sraven["eager, answers only"],
        sraven["softmax"],
    ]
    return [f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" for ratio in ratios]


def test_the_ratios_of_speed_and_memory_come_from_the_committed_benchmarks():
    section = README.partition("## Speed\n")[2].partition("\n## ")[0]
    shown = re.findall(r"\| (\d+\.\d+) \| (\d+\.\d+) \|$", section, flags=re.MULTILINE)
    expected = zip(ratios_of_speed_and_memory("cpu", "cpu-sraven"), ratios_of_speed_and_memory("h200"), strict=True)
    assert shown == list(expected)
    rows = json.loads((PROJECT / "recipes" / "results" / "bench" / "h100.json").read_text())["rows"]
    [ratio] = [row["ratios"]["hyla"] for row in rows if row["subject"] == "hyla, CUDA graphs"]
    assert f"a SRAVEN step on an H100 takes {ratio:.2f} of its usual time." in section


@pytest.mark.parametrize("path", RESULTS, ids=[str(path.relative_to(PROJECT)) for path in RESULTS])
def test_committed_records_were_made_by_committed_code_and_name_no_machine(path):
    record = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", record["environment"]["git_commit"])
    assert "/home" not in path.read_text() and "/root" not in path.read_text() and "/tmp" not in path.read_text()
