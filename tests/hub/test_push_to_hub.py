"""`push_to_hub` of transformers leaves a card that says what the config says, not transformers' empty one."""

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_hyla import HylaConfig, HylaForSequenceClassification, HylaModel


REPO = "org/mine"
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """transformers keeps the Hub that it first talked to."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)


def pushed_card(hub) -> ModelCard:
    return ModelCard(hub.repo(REPO).files()["README.md"].decode())


@pytest.mark.parametrize("attention", ["hyla", "linear", "softmax"])
@pytest.mark.parametrize("cls", [HylaForSequenceClassification, HylaModel])
def test_the_card_of_a_pushed_model_says_what_it_is_and_that_its_scores_are_not_known(hub_here, cls, attention):
    model = cls(HylaConfig(attention_type=attention, **SMALL))
    model.push_to_hub(REPO, tags=["mine"])
    card = pushed_card(hub_here)
    assert "More Information Needed" not in str(card) and "automatically generated" not in str(card)
    assert f"{model.num_parameters():,} parameters" in card.text and "trust_remote_code=True" in card.text
    assert "scores are not known" in card.text and f"hyla publish RUN --repo-id {REPO}" in card.text
    assert card.data.tags == ["mine", "hyla", f"{attention}-attention"] and card.data.library_name == "transformers"


def test_saving_with_push_to_hub_writes_the_same_card(hub_here, tmp_path):
    model = HylaForSequenceClassification(HylaConfig(**SMALL))
    model.push_to_hub(REPO)
    first = str(pushed_card(hub_here))
    HfApi().delete_repo(REPO)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=REPO)
    assert str(pushed_card(hub_here)) == first == (tmp_path / "mine" / "README.md").read_text()


def test_the_card_of_a_pushed_config_says_that_there_are_no_weights(hub_here):
    config = HylaConfig(attention_type="linear", vocab_size=None, input_size=5, **SMALL)
    config.push_to_hub(REPO)
    card = pushed_card(hub_here)
    assert "More Information Needed" not in str(card) and "automatically generated" not in str(card)
    assert "This is its config only" in card.text and "tokens of 5 numbers each" in card.text
    assert "parameters" not in card.text and "from_pretrained" not in card.text
    assert f"hyla publish RUN --repo-id {REPO}" in card.text
    assert card.data.tags == ["hyla", "linear-attention"] and card.data.library_name == "transformers"
    assert {"config.json", "configuration_hyla.py", "card_hyla.py"} <= set(hub_here.repo(REPO).files())


def test_a_model_that_is_pushed_after_its_config_gets_the_card_of_a_model(hub_here):
    config = HylaConfig(**SMALL)
    config.push_to_hub(REPO)
    HylaForSequenceClassification(config).push_to_hub(REPO)
    assert "config only" not in pushed_card(hub_here).text and "trust_remote_code=True" in pushed_card(hub_here).text


def test_a_card_that_somebody_has_written_stays(hub_here):
    HfApi().create_repo(REPO)
    HfApi().upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\nMine.\n")
    HylaForSequenceClassification(HylaConfig(**SMALL)).push_to_hub(REPO)
    assert pushed_card(hub_here).text.strip() == "Mine."


def test_a_model_that_was_loaded_by_the_code_of_its_repository_gets_the_card_too(hub, hub_here, tmp_path):
    HylaForSequenceClassification(HylaConfig(**SMALL)).push_to_hub(REPO)
    script = f"""
    import sys
    sys.modules["hf_hyla"] = None  # any import of the package fails
    from transformers import AutoModelForSequenceClassification, pipeline
    model = AutoModelForSequenceClassification.from_pretrained("{REPO}", trust_remote_code=True)
    model.push_to_hub("org/theirs")
    pipeline("symbolic-reasoning", model="{REPO}", trust_remote_code=True).push_to_hub("org/piped")
    """
    hub.run(script, tmp_path, hub.token)
    for name in ("org/theirs", "org/piped"):
        text = hub.repo(name).files()["README.md"].decode()
        assert "More Information Needed" not in text and f"hyla publish RUN --repo-id {name}" in text
        assert "card_hyla.py" in hub.repo(name).files()
