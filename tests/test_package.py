"""The package as a whole: silent to import, light, and layered as CONTRIBUTING.md says."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_hyla


PACKAGE = Path(hf_hyla.__file__).parent
PROJECT = PACKAGE.parent
OPTIONAL = ("numba", "triton", "sklearn", "matplotlib", "trackio", "gradio")


def python(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_importing_prints_nothing_and_needs_no_optional_package():
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in OPTIONAL)
    result = python(
        f"import sys\n{blocked}\nimport hf_hyla, hf_hyla.tasks, hf_hyla.training, hf_hyla.convert, hf_hyla.compare, "
        "hf_hyla.sweep, hf_hyla.cli, hf_hyla.hub.publish, hf_hyla.benchmark, hf_hyla.analysis"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_training_imports_neither_datasets_nor_evaluate():
    result = python(
        "import sys\nsys.modules['evaluate'] = sys.modules['datasets'] = None\n"
        "import hf_hyla.training, hf_hyla.tasks, hf_hyla.compare, hf_hyla.sweep, hf_hyla.benchmark, hf_hyla.hub.publish\nassert hf_hyla.tasks.get_task('sraven').dataset('train')[0]"
    )
    assert result.returncode == 0, result.stderr


# Who may import whom: part of the package → what else of the project and which libraries it may import.
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "model": ({"model"}, {"torch", "transformers", "huggingface_hub", "numpy", "numba", "triton"}),
    "metrics": ({"metrics"}, {"numpy", "evaluate", "datasets"}),
    "files": (set(), set()),
    "tasks": ({"tasks", "metrics", "files"}, {"numpy", "torch", "datasets", "pyarrow", "huggingface_hub"}),
    "training": (
        {"training", "model", "tasks", "metrics", "hub", "plots", "files"},
        {"accelerate", "torch", "transformers", "huggingface_hub", "safetensors", "yaml", "tqdm", "numpy"},
    ),
    # The trainer hands a finished run to hub; nothing of hub trains.
    "hub": (
        {"hub", "training", "model", "tasks", "metrics", "paper", "plots"},
        {"huggingface_hub", "safetensors", "torch", "yaml", "matplotlib"},
    ),
    "benchmark": ({"benchmark", "model", "tasks", "training"}, {"torch", "transformers"}),
    "analysis": ({"analysis", "model", "tasks", "files"}, {"torch", "numpy", "sklearn", "matplotlib", "tqdm"}),
    "convert": ({"model"}, {"torch", "safetensors", "huggingface_hub"}),
    "paper": ({"model"}, set()),
    "plots": ({"paper"}, {"matplotlib"}),
    "compare": ({"model", "paper", "tasks", "training"}, set()),
    "sweep": ({"tasks", "training"}, {"torch"}),
}


def imported(path: Path) -> set[str]:
    """First parts of what a file imports; parts of this package as `.part`."""
    names = set()
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names.add(node.module.partition(".")[0])
            else:
                base = inside[: len(inside) - node.level + 1]
                target = (*base, *(node.module.split(".") if node.module else [node.names[0].name]))
                names.add("." + target[0])
    return names


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_they_may(part):
    own, libraries = ALLOWED[part]
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for path in files:
        for name in imported(path) - STANDARD:
            if name.startswith("."):
                assert name[1:] in own, f"{path.name} imports {name}"
            else:
                assert name in libraries, f"{path.name} imports {name}"


def test_nobody_imports_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert ".cli" not in imported(path), path


def test_what_travels_to_the_hub_is_flat_and_imports_only_siblings():
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
    assert hf_hyla.__version__ in (PROJECT / "CHANGELOG.md").read_text()
    assert f"version: {hf_hyla.__version__}" in (PROJECT / "CITATION.cff").read_text()


def test_the_readme_names_every_python_file():
    readme = (PROJECT / "README.md").read_text()
    for path in [
        *PACKAGE.rglob("*.py"),
        *(PROJECT / "tests").rglob("*.py"),
        *(PROJECT / "recipes").glob("*/[a-z]*.py"),
    ]:
        assert path.name in readme, f"README.md does not name {path.relative_to(PROJECT)}"


def test_an_installed_package_holds_every_template():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    templates = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "hub_cards").glob("*_*.*")}
    assert {name: f"hf_hyla/{name}" for name in templates | {"recipes"}} == included
