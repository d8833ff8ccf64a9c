"""
transformers' own tests of models, run against this family: `make test-common`, or HYLA_COMMON_TESTS=1 in the environment.

They come from the source distribution of the installed transformers, fetched by pip into .cache/ at the project's top,
and are imported as the package `transformers_tests`; nothing of them is kept in this repository.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest


PACKAGE = "transformers_tests"
# What the tests import and this project does not need.
HELPERS = ["parameterized==0.9.0"]

# Why tests may be skipped, by a part of the reason that they give; a skip for any other reason is a failure.
EXPLAINED = {
    "requires|not supported on": "this machine has no such device or package.",
    "SDPA|sdpa|flex|Flash Attention": "fused softmax attention knows neither RMSHead nor value networks, and the family switches it off.",
    "attention mask API": "rows of several sequences are tested in tests/model/test_causal.py.",
    "TP plan": "scores are normalised over heads and codes mix them, so heads cannot lie on different devices.",
    "grouped_mm|sparse experts": "every expert sees every token, so that there is no sparse form to compare.",
    "RoPE": "positions are not rotary.",
    "position embeddings": "the relative table counts distances, whatever the length.",
    "sliding window": "attention has no window.",
    "language modeling head|_torch_compile_train_cls": "the family classifies and has no head for text.",
    "_keep_in_fp32_modules": "any weight may be in half precision; sums that would overflow are widened where they are taken.",
    "cache as input|returning cache": "a model that is not causal has no cache, and the classifier reads whole rows.",
    "No conversion": "weights are saved under the names they have in the model.",
    "composite|subconfigs": "there is one config, for one stack of layers.",
    "test_resize_embeddings": "fuzzy logic is read as numbers, without a vocabulary.",
}

# The plain run stays fast and needs no network.
enabled = os.environ.get("HYLA_COMMON_TESTS") == "1"
if enabled:
    # transformers' testing_utils reads it when it is imported. Nothing that runs without an accelerator is slow here.
    os.environ.setdefault("RUN_SLOW", "1")
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    if not enabled:
        return
    suite = _fetched(config.rootpath / ".cache" / f"transformers-{version('transformers')}")
    sys.path.append(str(suite))
    # Under --strict-markers a mark that nobody declared is an error.
    files = [*(suite / PACKAGE).rglob("*.py"), Path(find_spec("transformers").origin).parent / "testing_utils.py"]
    for mark in sorted({name for file in files for name in re.findall(r"\bmark\.(\w+)", file.read_text("utf-8"))}):
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # What is skipped in this folder says why itself.
    if (
        report.skipped
        and isinstance(report.longrepr, tuple)
        and Path(report.longrepr[0]).parent != Path(__file__).parent
    ):
        path, line, reason = report.longrepr
        why = next((why for part, why in EXPLAINED.items() if re.search(part, reason)), None)
        if why is None:
            report.outcome, report.longrepr = "failed", f"{reason}: explain in EXPLAINED why this may be skipped."
        else:
            report.longrepr = path, line, f"{reason}: {why}"
    return report


def _fetched(folder: Path) -> Path:
    """The folder with the tests of the installed transformers, fetched if it is not there."""
    if folder.is_dir():
        return folder
    release = f"transformers=={version('transformers')}"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary) / "unpacked"
        download = ["download", "--no-deps", "--no-binary", "transformers", "--dest", temporary, release]
        for arguments in (download, ["install", "--no-deps", "--target", str(unpacked), *HELPERS]):
            if subprocess.run([*pip, *arguments]).returncode:
                raise pytest.UsageError(
                    f"pip could not fetch {arguments[-1]}, which these tests need once for {folder}: see its message above, "
                    "and try again with a package index in reach."
                )
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                parts = Path(member.name).parts
                if len(parts) > 2 and parts[1] == "tests" and member.isfile():
                    member.name = str(Path(PACKAGE, *parts[2:]))
                    archive.extract(member, unpacked, filter="data")
        # The distribution leaves out this file, at which test_configuration_common.py looks.
        (unpacked / PACKAGE / "__init__.py").touch()
        # Last, so that an interrupted fetch leaves nothing that looks complete.
        unpacked.rename(folder)
    return folder
