"""The site that `make docs` builds: what mkdocs.yml names is there, and links between documents lead somewhere."""

import importlib
import re
from pathlib import Path

import pytest
import yaml


PROJECT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((PROJECT / "mkdocs.yml").read_text())


def pages(entry) -> list[str]:
    """The paths of a navigation: text, or a title with another entry, or a list of entries."""
    if isinstance(entry, str):
        return [entry]
    return [path for part in (entry.values() if isinstance(entry, dict) else entry) for path in pages(part)]


PAGES = pages(CONFIG["nav"])
DOCUMENTS = [path for path in PAGES if not path.startswith("reference/")]
MODULES = [path.removeprefix("reference/").removesuffix(".md") for path in PAGES if path.startswith("reference/")]


def test_every_document_is_a_page_of_the_site_once():
    found = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    found |= {
        str(path.relative_to(PROJECT))
        for pattern in ("recipes/**/*.md", "recipes/notebooks/*.ipynb", "hub_cards/**/*.md")
        for path in PROJECT.glob(pattern)
    }
    assert sorted(DOCUMENTS) == sorted(found)


@pytest.mark.parametrize("module", MODULES)
def test_every_page_of_the_reference_is_a_module_with_a_docstring(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_to_files(document):
    text = re.sub(r"```.*?```", "", (PROJECT / document).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"https?://", link):
            assert (PROJECT / document).parent.joinpath(link).is_file(), f"{document} links to {link}"


def test_the_site_asks_nothing_of_other_machines():
    assert CONFIG["theme"]["font"] is False
    assert not {"extra", "extra_css", "extra_javascript"} & CONFIG.keys()
    for plugin in CONFIG["plugins"]:
        assert plugin in ("search",) or plugin.keys() <= {"mkdocstrings", "mkdocs-jupyter"}
