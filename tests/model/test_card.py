"""Which cards of a folder are filled in. tests/hub/test_push_to_hub.py pushes them."""

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from model_helpers import make
from transformers.utils.hub import create_and_tag_model_card

from hf_hyla import HylaConfig
from hf_hyla.model.card_hyla import fill_in_card


REPO = "org/mine-1.5"
EDITS = [
    ("empty", "[More Information Needed]", "me"),
    ("empty", "automatically generated.", "automatically generated. Mine."),
    ("empty", "\n## Glossary", "\nI am still writing this card.\n\n## Glossary"),
    ("config", "numbers each.", "numbers each. It is mine."),
    ("config", "16 heads", "16 heads\nof mine"),
    ("config", "\nIf the model", "\nI am still writing this card.\n\nIf the model"),
]


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """transformers' empty card, as `push_to_hub` leaves it in a folder."""

    def missing(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    monkeypatch.setattr(ModelCard, "load", missing)
    create_and_tag_model_card(REPO, tags=["mine"]).save(tmp_path / "README.md")
    return tmp_path / "README.md"


def test_the_empty_card_is_filled_in_even_if_its_metadata_are(readme):
    card = ModelCard(readme.read_text())
    card.data.license = "mit"
    card.save(readme)
    fill_in_card(readme.parent, REPO, HylaConfig(), make())
    card = ModelCard(readme.read_text())
    assert "parameters" in card.text and (card.data.license, card.data.tags[0]) == ("mit", "mine")


def test_the_card_of_a_config_is_written_anew_for_another_config_and_for_a_model(readme):
    fill_in_card(readme.parent, REPO, HylaConfig(num_hidden_layers=1))
    assert "1 layer with" in readme.read_text()
    fill_in_card(readme.parent, REPO, HylaConfig(vocab_size=None, input_size=5, attention_type="softmax"))
    assert "4 layers with" in readme.read_text() and "softmax attention, of the family" in readme.read_text()
    fill_in_card(readme.parent, REPO, HylaConfig(), make())
    assert "parameters" in readme.read_text()


@pytest.mark.parametrize(("kind", "before", "after"), EDITS)
def test_a_card_that_somebody_has_begun_to_fill_in_stays(readme, kind, before, after):
    if kind == "config":
        fill_in_card(readme.parent, REPO, HylaConfig(vocab_size=None, input_size=5))
    text = readme.read_text().replace(before, after, 1)
    assert after in text
    readme.write_text(text)
    fill_in_card(readme.parent, REPO, HylaConfig(), make())
    assert readme.read_text() == text


def test_a_card_whose_metadata_are_invalid_stays(readme):
    readme.write_text("---\nlicense: [\n---\nMine.\n")
    fill_in_card(readme.parent, REPO, HylaConfig())
    assert readme.read_text().endswith("Mine.\n")


def test_a_folder_without_a_card_gets_none(tmp_path):
    fill_in_card(tmp_path, REPO, HylaConfig())
    assert not list(tmp_path.iterdir())
