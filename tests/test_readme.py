"""What README.md shows is what happens: its snippets run, its numbers are those of committed run records."""

import contextlib
import io
import itertools
import json
import random
import re
import shlex
import statistics
from collections import Counter
from pathlib import Path

import pytest

from hf_hyla.cli import main, parse
from hf_hyla.runs.paper import paper_result
from hf_hyla.tasks import get_task


PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
# A python block, and the text block that shows what it prints.
SNIPPETS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL)
# The lines of bash blocks that call this project's commands.
LINES = [
    line
    for name in ("README.md", "hub_cards/README.md", "recipes/README.md", "recipes/accelerate/README.md")
    for block in re.findall(r"```bash\n(.*?)```", (PROJECT / name).read_text(), flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"hyla|python|accelerate", line)
]
RESULTS = sorted([
    *(PROJECT / "recipes" / "results").glob("*/*.json"),
    PROJECT / "recipes" / "results" / "sraven-ideal-observer.json",
    *PROJECT.glob("hub_cards/*/probe/probe.json"),
])  # fmt: skip


def test_every_python_snippet_shows_its_output():
    assert len(SNIPPETS) == README.count("```python") > 0


@pytest.mark.parametrize(("code", "shown"), SNIPPETS)
def test_snippets_print_what_is_shown(code, shown):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


@pytest.mark.parametrize("line", LINES)
def test_commands_are_ones_that_the_command_line_takes_and_name_files_that_are_there(line):
    words = shlex.split(line, comments=True)
    if words[0] != "python":
        parse(words[1 + words.index("hyla" if "hyla" in words else "hf_hyla") :])
    assert all(list(PROJECT.glob(word)) for word in words if word.startswith("recipes/"))


@pytest.mark.parametrize("name", ["logic-demo", "logic-demo-attention_type=softmax"])
def test_the_demos_scores_are_those_of_its_committed_record(name):
    record = json.loads((PROJECT / "recipes" / "results" / name / "0.json").read_text())
    for split, scores in record["metrics"].items():
        assert f"{split:<15}{scores['r2']:>18.4f}" in README
    assert f"{record['samples_seen']:,} training samples" in README
    assert f"{record['seconds'] / 60:.1f} minutes of training" in README


def test_the_table_of_results_is_what_the_command_prints(capsys):
    main(["compare", str(PROJECT / "recipes" / "results")])
    assert f"$ hyla compare recipes/results\n{capsys.readouterr().out}```" in README


def test_what_recipes_say_of_held_out_draws_follows_from_the_committed_scores_by_combination():
    found = json.loads((PROJECT / "recipes" / "results" / "logic-by-combination" / "softmax.json").read_text())
    by_rarest = {}
    for one in found["combinations"]:
        by_rarest.setdefault(min(one["trained"]), []).append(one["scores"]["r2"])
    mean = {times: statistics.fmean(scores) for times, scores in by_rarest.items()}

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
    text = " ".join((PROJECT / "recipes" / "README.md").read_text().split())
    assert f"from {mean[1]:.2f} for one to {mean[4]:.2f} for four" in text
    assert f"moves the mean by a standard deviation of {statistics.stdev(draws):.2f} only" in text
    assert round(2000 / lacking) == 7 and "one in seven lacks a term" in text


def test_what_recipes_say_of_the_papers_own_draws_is_what_the_committed_records_hold():
    results = PROJECT / "recipes" / "results"

    def ood(recipe, seed):
        return json.loads((results / recipe / f"{seed}.json").read_text())["metrics"]["ood"]["r2"]

    def in_jax(seed):
        return json.loads((results / f"logic-in-jax-softmax-{seed}.json").read_text())["curve"][-1]["ood"]

    def lacking_and_not(attention):
        path = results / "logic-by-combination" / f"{attention}-reference-split-2.json"
        found = json.loads(path.read_text())["combinations"]
        return [[c["scores"]["r2"] for c in found if (min(c["trained"]) == 0) is lacking] for lacking in (True, False)]

    text = " ".join((PROJECT / "recipes" / "README.md").read_text().split())
    for attention, name in (("hyla", "HYLA reaches"), ("softmax", "softmax attention")):
        with_one, without = lacking_and_not(attention)
        assert f"{len(with_one)} of the {len(with_one) + len(without)} held-out combinations hold one of them" in text
        score = ood(f"logic-{attention}-reference_split=True", 2)
        parts = rf"\({statistics.fmean(with_one):.2f} with(?: such a term)?, {statistics.fmean(without):.2f} without\)"
        assert re.search(rf"{name} {score:.4f} {parts}", text)
    task, left, errors = get_task("logic", num_examples=32, held_out=0.7), [], []
    for attention in ("hyla", "softmax"):
        scores = [ood(f"logic-{attention}-reference_split=True", seed) for seed in range(3)]
        mean, error = statistics.fmean(scores), statistics.stdev(scores) / 3**0.5
        theirs = paper_result({"task": {"name": task.name, **task.settings}, "model": {"attention_type": attention}})
        assert f"{mean:.4f} ± {error:.4f}" in text and f"{theirs.mean:.4f} ± {theirs.standard_error:.4f}" in text
        left.append(f"{mean - theirs.mean:.2f}")
        errors.append(f"{(error**2 + theirs.standard_error**2) ** 0.5:.2f}")
    assert "{} and {}, are about one standard error ({} and {}) or less".format(*left, *errors) in text
    assert f"At 1e-3 softmax attention reaches {ood('logic-softmax-learning_rate=0.001', 0):.4f}." in text
    ours = [ood("logic-demo-attention_type=softmax-reference_split=True", seed) for seed in (0, 2)]
    assert f"at {in_jax(0):.4f} and {in_jax(2):.4f}, ours at {ours[0]:.4f} and {ours[1]:.4f}" in text


def test_what_readme_says_of_codes_is_what_the_committed_probes_found():
    def rule(model):
        report = json.loads((PROJECT / "hub_cards" / f"{model}-sraven" / "probe" / "probe.json").read_text())
        [result] = [r for r in report["probes"] if (r["subject"], r["layer"]) == ("rule", None)]
        alone = report["answer_alone"]["rule"]["accuracy"]["value"]
        return [result["scores"]["accuracy"]["value"], result["chance"]["accuracy"], alone]

    hyla, softmax = rule("hyla"), rule("softmax")
    paragraph = README.partition("On SRAVEN the codes say which operation runs.")[2].partition("\n\n")[0]
    assert re.findall(r"\d\.\d\d", paragraph) == [f"{hyla[0]:.2f}", f"{softmax[0]:.2f}", f"{hyla[1]:.2f}"]
    assert {f"{x:.2f}" for x in hyla[1:] + softmax[1:]} == {f"{hyla[1]:.2f}"}


def test_the_ratios_of_speed_and_memory_are_those_of_the_committed_benchmark():
    bench = PROJECT / "recipes" / "results" / "bench"
    whole, *of_steps = (
        json.loads((bench / f"{name}.json").read_text()) for name in ("cpu", "cpu-sraven", "cpu-logic")
    )
    assert whole["failed"] == [] and all(record["failed"] == [] for record in of_steps)
    rows = [row for row in whole["rows"] if row["part"] in ("attention", "data")]
    rows += [row for record in of_steps for row in record["rows"]]

    def row(part, work, subject, shape=None):
        key = (part, work, shape, subject)
        [found] = [row for row in rows if (row["part"], row["work"], row.get("shape"), row["subject"]) == key]
        return found

    both, step = "forward + backward", "training step of 128"
    puzzles, long, longest = (
        f"{size}, float32"
        for size in ("128 x 36 x 16 heads x 4", "1 x 1024 x 8 heads x 16", "1 x 4096 x 8 heads x 16")
    )
    bytes_of = {name: row("attention", both, name, longest)["peak_bytes"] for name in ("fused", "lean", "eager")}
    ratios = [
        row("attention", both, "fused", puzzles)["ratios"]["eager"],
        row("attention", both, "fused", long)["ratios"]["eager"],
        row("attention", both, "fused", long)["ratios"]["sdpa"],
        row("attention", both, "fused", long)["ratios"]["sdpa, fixed bias"],
        bytes_of["fused"] / bytes_of["eager"],
        bytes_of["lean"] / bytes_of["eager"],
        row("sraven", step, "hyla")["ratios"]["eager"],
        row("sraven", step, "hyla")["ratios"]["eager, answers only"],
        row("sraven", step, "hyla")["ratios"]["softmax"],
        row("sraven", step, "hyla")["ratios"]["matrix products"],
        row("logic", step, "hyla")["ratios"]["eager"],
        row("logic", step, "hyla")["ratios"]["eager, answers only"],
        row("sraven", step, "hyla, compiled")["ratios"]["hyla"],
        row("logic", step, "hyla, compiled")["ratios"]["hyla"],
        row("data", "sraven, batch of 128", "sequential")["ratios"]["training step"],
        row("data", "logic, batch of 128", "sequential")["ratios"]["training step"],
    ]
    section = README.partition("## Speed\n")[2].partition("\n## ")[0]
    shown = re.findall(r"\| (\d+\.\d+) \|$", section, flags=re.MULTILINE)
    assert shown == [f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" for ratio in ratios]


@pytest.mark.parametrize("path", RESULTS, ids=[str(path.relative_to(PROJECT)) for path in RESULTS])
def test_committed_records_were_made_by_committed_code_and_name_no_machine(path):
    record = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", record["environment"]["git_commit"])
    assert "/home" not in path.read_text() and "/root" not in path.read_text() and "/tmp" not in path.read_text()
