"""Tests of the package as a whole: imports are silent and light, and parts import what CONTRIBUTING.md allows."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_hyla
from hf_hyla import utils


PACKAGE = Path(hf_hyla.__file__).parent
PROJECT = PACKAGE.parent
OPTIONAL = ("numba", "llvmlite", "triton", "sklearn", "matplotlib", "trackio", "gradio")
NOT_FOR_TRAINING = ("datasets", "evaluate")


def test_importing_prints_nothing_and_needs_neither_optional_packages_nor_datasets_and_evaluate():
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in OPTIONAL + NOT_FOR_TRAINING)
    script = (
        f"import sys\n{blocked}\nimport hf_hyla, hf_hyla.tasks, hf_hyla.training, hf_hyla.convert, hf_hyla.runs.compare, "
        "hf_hyla.training.sweep, hf_hyla.cli, hf_hyla.hub.publish, hf_hyla.benchmark, hf_hyla.analysis\n"
        "assert hf_hyla.tasks.get_task('sraven').dataset('train')[0]"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# Who may import whom: part of the package → what else of the project, and which libraries.
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "model": (set(), {"torch", "transformers", "huggingface_hub", "numpy", "numba", "llvmlite", "triton"}),
    "utils": (set(), {"huggingface_hub"}),
    "reading": (set(), {"yaml"}),
    "paths": ({"utils"}, {"huggingface_hub"}),
    "typed_yaml": ({"reading", "utils"}, set()),
    "settings": ({"typed_yaml", "reading", "utils"}, set()),
    "metrics": (set(), {"numpy", "evaluate", "datasets"}),
    "tasks": (
        {"metrics", "reading", "utils"},
        {"numpy", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "tqdm", "huggingface_hub"},
    ),
    "runs": (
        {"tasks", "metrics", "model", "settings", "typed_yaml", "reading", "utils"},
        {"torch", "transformers", "huggingface_hub", "safetensors", "matplotlib"},
    ),
    "training": (
        {"model", "tasks", "metrics", "runs", "settings", "typed_yaml", "reading", "utils", "paths"},
        {"accelerate", "torch", "transformers", "huggingface_hub", "safetensors", "yaml", "tqdm", "numpy"},
    ),
    "analysis": (
        {"model", "tasks", "metrics", "reading", "utils"},
        {"torch", "numpy", "scipy", "sklearn", "matplotlib", "tqdm"},
    ),
    "hub": (
        {"runs", "tasks", "metrics", "model", "settings", "typed_yaml", "reading", "utils"},
        {"huggingface_hub", "safetensors", "torch", "yaml", "datasets", "tqdm"},
    ),
    "demo": (
        {"runs", "analysis", "tasks", "metrics", "model", "settings", "typed_yaml", "reading", "utils"},
        {"gradio", "torch", "transformers", "huggingface_hub", "numpy"},
    ),
    "convert": ({"model", "reading"}, {"torch", "safetensors", "huggingface_hub"}),
    "benchmark": (
        {"training", "model", "tasks", "metrics", "runs", "settings", "typed_yaml", "reading", "utils", "paths"},
        {"torch", "transformers"},
    ),
}
# Imports the modules of each part in a process of its own, forked from one that has imported the model, and prints which parts
# of the package were loaded with them.
LOADING = """
import importlib, json, os, sys
from unittest.mock import MagicMock
import hf_hyla.model
sys.modules["gradio"] = MagicMock()
for part, modules in json.loads(sys.argv[1]).items():
    if not os.fork():
        for module in modules:
            importlib.import_module(module)
        loaded = {name.split(".")[1] for name in sys.modules if name.startswith("hf_hyla.")}
        print(json.dumps([part, sorted(loaded)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, part
"""


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE / "hub" / "templates"]


def files_of(part: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(PACKAGE / part) or path == PACKAGE / f"{part}.py"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """What a file imports anywhere in it, inside functions too: modules of this package, and names of libraries."""
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            inside = {f"{module}.{alias.name}" for alias in node.names} & MODULES
            names |= inside or {module}
    return {name if name in MODULES else name.partition(".")[0] for name in names}


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_they_may(part):
    own, libraries = ALLOWED[part]
    for path in files_of(part):
        for name in imported(path) - STANDARD:
            if name in MODULES:
                assert name.split(".")[1] in {part, *own}, f"{path.name} imports {name}"
            else:
                assert name in libraries, f"{path.name} imports {name}"


def test_parts_load_only_what_they_may_and_never_the_trainer_after_a_run():
    modules = {part: [module_of(path) for path in files_of(part)] for part in ALLOWED}
    words = [sys.executable, "-c", LOADING, json.dumps(modules)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    loaded = dict(map(json.loads, result.stdout.splitlines()))
    assert loaded.keys() == ALLOWED.keys()
    for part, (own, _) in ALLOWED.items():
        # The package itself registers the model.
        assert set(loaded[part]) <= {part, *own, "model"}, part
    assert not any("training" in loaded[part] for part in ("hub", "runs", "analysis", "demo"))


def test_no_files_import_each_other_in_a_circle():
    graph = {}
    for path in FILES:
        module, found = module_of(path), imported(path) & MODULES
        # With a module its packages are loaded, but for those that are being loaded when the file is.
        packages = {parent for name in found for parent in parents(name)} - {module, *parents(module)}
        graph[module] = found | packages
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def test_no_other_part_imports_the_command_line():
    for path in FILES:
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert not any(name.startswith("hf_hyla.cli") for name in imported(path)), path


def test_model_files_are_flat_and_import_only_siblings():
    for path in (PACKAGE / "model").iterdir():
        if path.suffix != ".py" or path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: {ast.unparse(node)}"
        assert "from __future__ import annotations" not in path.read_text()


def test_version_and_entry_point_are_declared_once():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and project["scripts"] == {"hyla": "hf_hyla.cli:main"}
    newest = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", (PROJECT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest[1] == hf_hyla.__version__
    assert f"version: {hf_hyla.__version__}" in (PROJECT / "CITATION.cff").read_text()


MODEL_FILES = ("config.json", "model.safetensors", "run.json")


def test_an_installed_package_finds_its_recipes_and_models_inside_itself(monkeypatch, tmp_path):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    models = [f"hub_cards/{name}/{file}" for name in utils.DEMO_MODELS for file in MODEL_FILES]
    included = ["recipes", *models]
    assert wheel["packages"] == ["hf_hyla"] and wheel["force-include"] == {
        name: f"hf_hyla/{name}" for name in included
    }
    assert all((PROJECT / name).exists() for name in included)
    assert utils.recipes_folder() == PROJECT / "recipes"
    (tmp_path / "recipes").mkdir()  # of another package
    (tmp_path / "hf_hyla" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "hf_hyla" / "utils.py"))
    assert utils.recipes_folder() == tmp_path / "hf_hyla" / "recipes"
    (tmp_path / "hf_hyla" / "hub_cards").mkdir()
    assert utils.models_folder() == tmp_path / "hf_hyla" / "hub_cards"
