"""Tests of `hyla bench --against`, which compares two versions."""

import json
import shutil
from pathlib import Path

import pytest

from hf_hyla.benchmark import as_table, compare_with


PROJECT = Path(__file__).parents[1]
TINY = {
    "model.num_hidden_layers": "1",
    "model.hidden_size": "16",
    "model.intermediate_size": "16",
}


def other_checkout(folder, attention=""):
    """A copy of the package, whose attention does first what is said."""
    shutil.copytree(PROJECT / "hf_hyla", folder / "hf_hyla", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "recipes" / "sraven", folder / "recipes" / "sraven")
    with (folder / "hf_hyla" / "__init__.py").open("a") as file:
        file.write(
            "\nimport time\nfrom transformers import AttentionInterface\n_right = AttentionInterface()['hyla']\n"
            f"def _other(*args, **kwargs):\n    {attention}\n    return _right(*args, **kwargs)\n"
            "AttentionInterface.register('hyla', _other)\n"
        )
    return folder


def test_a_slower_checkout_is_measured_to_be_slower(tmp_path):
    other = str(other_checkout(tmp_path / "other", attention="time.sleep(0.2)"))
    result = compare_with(other, threads=1, repeats=3, overrides=TINY, batch_size=4)
    works = {row["work"]: row for row in result["rows"] if row["subject"] == "this checkout"}
    assert set(works) == {"attention of sraven/hyla, float32", "step of sraven/hyla, float32"}
    for row in works.values():
        there = next(r for r in result["rows"] if r["work"] == row["work"] and r["subject"] != "this checkout")
        assert row["repeats"] == 3 and row["seconds"] < 0.2 < there["seconds"]
        (ratio,) = row["ratios"].values()
        assert ratio == pytest.approx(row["seconds"] / there["seconds"]) and f"{ratio:.3f} x " in as_table(result)
    assert result["threads"] == 1 and str(tmp_path) not in json.dumps(result)


def test_a_commit_can_be_measured_on_text_under_autocast(tmp_path):
    # A language model reads some documents of the test's own, and its attention is causal.
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"Document {number} of many, which are all alike. " * 5)
    documents = {"task.files": str(tmp_path / "*.txt"), "task.held_out": "0.2", "task.sequence_length": "8"}
    overrides = TINY | {"model.head_dim": "4"} | documents
    result = compare_with(
        "HEAD", bf16=True, threads=1, repeats=1, batch_size=4, recipe="text/hyla", overrides=overrides
    )
    assert [row["subject"] for row in result["rows"]] == 2 * ["this checkout", "HEAD"]
    assert result["rows"][0]["work"].endswith("bfloat16 autocast")


def test_a_version_that_cannot_be_compared_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be a folder, or a commit of this checkout, got nosuch: fatal"):
        compare_with("nosuch")
    with monkeypatch.context() as patch:
        patch.setattr("hf_hyla.paths.CHECKOUT", tmp_path)  # an installed package, perhaps inside another repository
        with pytest.raises(ValueError, match="folder of a checkout, since this package lies in none, got HEAD"):
            compare_with("HEAD")
    with pytest.raises(ValueError, match=r"holds no hf_hyla/__init__\.py"):
        compare_with(str(tmp_path))
    broken = other_checkout(tmp_path / "broken")
    (broken / "hf_hyla" / "__init__.py").write_text("raise RuntimeError('half a checkout')")
    with pytest.raises(ValueError, match="broken cannot be measured: RuntimeError: half a checkout"):
        compare_with(str(broken), threads=1, overrides=TINY, batch_size=4)
