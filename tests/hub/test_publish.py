"""Tests of publishing and of failures of the Hub, over HTTP with the loopback Hub."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import TrainingArguments

from hf_hyla import HylaForSequenceClassification, model
from hf_hyla.cli import main
from hf_hyla.hub.model_card import card_files
from hf_hyla.hub.publish import check_before_training, publish, publish_run
from hf_hyla.hub.repository import plan
from hf_hyla.runs import Run
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, HylaTrainingArguments, load_recipe


REPO = "org/hyla-logic"
# The dataset of the fixtures' SRAVEN run.
SRAVEN_DATA = "org/sraven-num_features-2"


@pytest.fixture(scope="module")
def planned(logic_run):
    """The model's repository, for tests of what happens to it."""
    return plan(Run.load(logic_run), REPO)


def contents(repository):
    return {name: c.read_bytes() if isinstance(c, Path) else c for name, c in repository.files.items()}


def published(repo):
    return {name: data for name, data in repo.files().items() if name != ".gitattributes"}


def test_a_run_is_published_completely_in_one_commit_and_not_twice(hub_here, logic_run, planned):
    [line] = publish(planned)
    repo = hub_here.repo(REPO)
    assert [commit.title for commit in repo.commits] == ["initial commit", "Publish with hf_hyla"]
    assert published(repo) == contents(planned[0])
    assert {"README.md", "config.json", "model.safetensors", "modeling_hyla.py", "run.json", "comparison.png",
            "learning_curve.png", "resolved_recipe.yaml", ".eval_results/logic.yaml"} <= set(published(repo))  # fmt: skip
    assert not [name for name in published(repo) if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert "published" in line
    [line] = publish(plan(Run.load(logic_run), REPO))
    assert len(repo.commits) == 2 and f"unchanged, {hub_here.endpoint}/{REPO}/commit/{repo.head}" in line


def test_the_repositories_beside_the_model_are_linked_and_made_only_once(hub_here, sraven_run, dataset, capsys):
    command = [
        "publish",
        str(sraven_run),
        "--repo-id",
        "org/hyla-sraven",
        "--dataset",
        str(dataset),
        "--metric",
        "--space",
    ]
    assert main([*command, "--collection", "HYLA"]) == 0
    heads = {key: repo.head for key, repo in hub_here.repos.items()}
    assert set(heads) == {
        ("dataset", SRAVEN_DATA),
        ("space", "org/hyla_sraven_accuracy"),
        ("model", "org/hyla-sraven"),
        ("space", "org/hyla-sraven-demo"),
    }
    assert all(len(repo.commits) == 2 for repo in hub_here.repos.values())
    assert set(published(hub_here.repo(SRAVEN_DATA, "dataset"))) == {
        "README.md", "task.json", "data/ood-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"
    }  # fmt: skip
    assert f'load_dataset("{SRAVEN_DATA}"'.encode() in published(hub_here.repo(SRAVEN_DATA, "dataset"))["README.md"]
    printed = capsys.readouterr().out
    assert "left out  notes.txt" in printed and printed.count(": published, http") == 4
    [collection] = hub_here.collections.values()
    assert {(item["type"], item["id"]) for item in collection["items"]} == set(heads)
    assert main([*command, "--collection", "HYLA"]) == 0
    assert heads == {key: repo.head for key, repo in hub_here.repos.items()}
    assert len(hub_here.collections) == 1 and len(collection["items"]) == 4


def test_the_code_that_is_published_is_the_packages_where_none_lies_beside_the_weights(logic_run, planned, copied):
    run = copied(logic_run)
    for path in run.glob("*_hyla.py"):
        path.unlink()
    [repository] = plan(Run.load(run), REPO)
    package = {path.name: path.read_bytes() for path in Path(model.__file__).parent.glob("*_hyla.py")}
    assert package.items() <= contents(repository).items() and len(package) > 5
    assert contents(repository) == contents(planned[0])


def test_a_dry_run_lists_files_and_sizes_without_a_request(hub_here, logic_run, capsys):
    assert main(["publish", str(logic_run), "--repo-id", REPO, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf" {(logic_run / 'model.safetensors').stat().st_size:,}  model\.safetensors", printed)
    assert "left out  checkpoints/" in printed
    assert hub_here.requests == []


def test_a_run_that_is_older_than_digests_is_published_with_a_note(logic_run, copied):
    assert "note:" not in plan(Run.load(logic_run), REPO)[0].listing()
    assert "note: run.json is older than digests" in plan(Run.load(copied(logic_run, digests=None)), REPO)[0].listing()


def test_a_publication_can_be_written_into_a_folder_and_published_from_there(
    hub_here, logic_run, planned, tmp_path, capsys
):
    command = ["publish", str(logic_run), "--repo-id", REPO, "--metric", "--output", str(tmp_path)]
    assert main(command) == 0 and hub_here.requests == []
    folder = tmp_path / "hyla-logic"
    written = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert written == contents(planned[0]) == contents(plan(Run.load(folder), REPO)[0])
    assert (tmp_path / "hyla_logic_r2" / "app.py").exists()
    assert main(command) == 0  # again
    (folder / "notes.txt").write_text("mine")
    assert main(command) == 2 and "holds notes.txt, which would not be published" in capsys.readouterr().err


def test_a_model_and_a_dataset_of_one_name_are_written_into_two_folders(sraven_run, dataset, tmp_path, capsys):
    output = tmp_path / "hub"
    command = ["publish", str(sraven_run), "--repo-id", SRAVEN_DATA, "--dataset", str(dataset), "--metric"]
    command += ["--output", str(output)]
    name = SRAVEN_DATA.partition("/")[2]
    (output / f"{name}-model").mkdir(parents=True)
    (output / f"{name}-model" / "notes.txt").write_text("mine")
    # The dataset and the metric come before the model, and are not written either.
    assert main(command) == 2 and "holds notes.txt, which would not be published" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [f"{name}-model"]
    (output / f"{name}-model" / "notes.txt").unlink()
    assert main(command) == 0 and main(command) == 0
    assert {path.name for path in output.iterdir()} == {f"{name}-dataset", f"{name}-model", "hyla_sraven_accuracy"}
    assert (output / f"{name}-dataset" / "task.json").exists() and (output / f"{name}-model" / "config.json").exists()


def test_snippets_of_published_cards_print_what_they_show_in_an_empty_folder(hub, logic_run, hub_here, tmp_path):
    publish(plan(Run.load(logic_run), REPO, metric=True))
    sraven = plan_metric("sraven", hub_here)
    cards = [hub.repo(REPO), hub.repo("org/hyla_logic_r2", "space"), sraven]
    snippets = [
        re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", repo.files()["README.md"].decode(), re.DOTALL).groups()
        for repo in cards
    ]
    home = tmp_path / "empty"
    home.mkdir()
    script = "\nprint('next')\n".join(code for code, _ in snippets)
    quiet = "import os, sys\nos.environ['HF_UPDATE_DOWNLOAD_COUNTS'] = '0'\nsys.modules['hf_hyla'] = None\n"
    printed = hub.run(quiet + script, home)
    assert printed.split("next\n") == [shown for _, shown in snippets]


def plan_metric(task, hub):
    """Publishes the metric of a task alone."""
    from hf_hyla.hub.repository import Repository, encoded
    from hf_hyla.hub.spaces import metric_files, metric_repo

    name = metric_repo(get_task(task), REPO)
    publish([Repository(name, "space", encoded(metric_files(get_task(task), REPO)))])
    return hub.repo(name, "space")


def test_private_repositories_are_private_and_nothing_is_sent_if_one_is_public(hub_here, planned, logic_run):
    publish(planned, private=True)
    assert hub_here.repo(REPO).private
    HfApi().delete_repo(REPO)
    HfApi().create_repo(REPO)
    # The metric's repository comes before the model's, and is not made either.
    with pytest.raises(ValueError, match=f"model {REPO} is public already, so nothing was sent"):
        publish(plan(Run.load(logic_run), REPO, metric=True), private=True)
    assert published(hub_here.repo(REPO)) == {} and len(hub_here.repos) == 1


def test_files_of_an_earlier_model_are_removed_and_those_of_others_stay(hub_here, planned):
    api = HfApi()
    api.create_repo(REPO)
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_hyla.py", "probe/old.png"]
    for name in (*old, ".eval_results/sraven.yaml", "notes.md"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"old", path_in_repo=name)
    publish(planned)
    assert set(published(hub_here.repo(REPO))) == {*planned[0].files, "notes.md"}


@pytest.fixture(scope="module")
def other_seed_planned(other_seed):
    return plan(Run.load(other_seed), REPO)


FAULTS = [
    ("POST /api/repos/create", 429, "too many requests"),
    (f"GET /api/models/{REPO}", 500, "an error of its own (status 500)"),
    ("validate-yaml", 400, "refuses the card's metadata"),
    ("validate-yaml", 503, "something other than JSON"),
    ("validate-yaml", "cut", "cannot be reached"),
    ("preupload", 401, "log in by `hf auth login`"),
    ("preupload", 503, "an error of its own (status 503)"),
    ("PUT /storage", 500, "an error of its own (status 500)"),
    ("PUT /storage", "cut", "cannot be reached"),
    ("commit/main", 403, "may not write there"),
    ("commit/main", 409, "somebody else is changing it"),
    ("commit/main", 500, "an error of its own (status 500)"),
    ("commit/main", "stale", "changed it in the meantime"),
    ("commit/main", "cut", "cannot be reached"),
    ("commit/main", "lost answer", "cannot be reached"),
]


@pytest.mark.parametrize(("request_", "fault", "message"), FAULTS)
def test_a_fault_is_one_sentence_and_the_same_command_succeeds_afterwards(
    hub_here, planned, other_seed_planned, request_, fault, message
):
    publish(other_seed_planned)
    repo = hub_here.repo(REPO)
    old, new = published(repo), contents(planned[0])
    # Often enough to outlast the tries of huggingface_hub.
    hub_here.fail(request_, with_=fault, times=1 if fault in ("stale", "lost answer") else 20)
    with pytest.raises(OSError, match=f"^Publishing the model {REPO} failed") as error:
        publish(planned)
    assert message in str(error.value) and hub_here.token not in str(error.value)
    now = {name: data for name, data in published(repo).items() if name != "else.txt"}
    assert now == (new if fault == "lost answer" else old)
    hub_here.heal()
    publish(planned)
    assert {name: data for name, data in published(repo).items() if name != "else.txt"} == new


@pytest.mark.parametrize(("request_", "fault", "message"), FAULTS)
def test_a_fault_at_the_first_publication_leaves_a_new_repository_empty_or_whole(
    hub_here, planned, request_, fault, message
):
    hub_here.fail(request_, with_=fault, times=1 if fault in ("stale", "lost answer") else 20)
    with pytest.raises(OSError, match="a new repository may exist but be empty") as error:
        publish(planned)
    assert message in str(error.value) and "\n" not in str(error.value)
    new, there = contents(planned[0]), [published(repo) for repo in hub_here.repos.values()]
    assert there in ([], [{}], [{"else.txt": b"else"}], [new])
    hub_here.heal()
    publish(planned)
    assert new.items() <= published(hub_here.repo(REPO)).items()


@pytest.mark.parametrize("request_", ["POST /api/collections$", "POST /api/collections/.*/items"])
@pytest.mark.parametrize(
    ("fault", "message"), [(500, "an error of its own (status 500)"), ("cut", "cannot be reached")]
)
def test_a_collection_that_fails_half_way_is_reported_and_completed_by_the_same_command(
    hub_here, logic_run, request_, fault, message
):
    repositories = plan(Run.load(logic_run), REPO, metric=True)
    hub_here.fail(request_, with_=fault, times=20, after=1 if "items" in request_ else 0)
    with pytest.raises(OSError, match=r"^Publishing the collection 'HYLA' failed") as error:
        publish(repositories, collection="HYLA")
    assert message in str(error.value) and "it may hold some of them only" in str(error.value)
    assert f"Published before it: space org/hyla_logic_r2, model {REPO}." in str(error.value)
    hub_here.heal()
    publish(repositories, collection="HYLA")
    [collection] = hub_here.collections.values()
    assert [item["id"] for item in collection["items"]] == ["org/hyla_logic_r2", REPO]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("HTTP status client error (401 Unauthorized) for url (http://cas:8443/x)", "log in by `hf auth login`"),
        ("HTTP status client error (403 Forbidden) for url (http://cas:8443/x)", "may not write there"),
        (
            "HTTP status client error (400 Bad Request) for url (http://cas:8443/x)",
            "refuses the card's metadata or the",
        ),
        (
            "HTTP status server error (500 Internal Server Error) for url (http://cas/x)",
            "an error of its own (status 500)",
        ),
        (
            "error sending request for url (http://cas:443/500): connection refused",
            "cannot be reached (ConnectionError)",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_of_xet_is_one_sentence_too(hub_here, planned, monkeypatch, said, message, wrapped):
    def fail(*_, **__):
        try:
            raise ConnectionError(said)
        except ConnectionError as error:
            if not wrapped:
                raise
            raise RuntimeError("Error while uploading") from error

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(OSError, match=f"^Publishing the model {REPO} failed") as error:
        publish(planned)
    assert message in str(error.value) and "cas" not in str(error.value)


def test_offline_mode_is_called_so(planned, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled):
        publish(planned)


def test_a_title_that_the_hub_refuses_is_said_to_be_that(hub_here, planned):
    hub_here.fail("POST /api/collections$", with_=400, times=20)
    with pytest.raises(OSError, match=r"the Hub refuses it \(status 400\): choose another title"):
        publish(planned, collection="HYLA")


def test_an_error_names_what_was_published_before_it(hub_here, logic_run, capsys):
    hub_here.fail(f"models/{REPO}/commit", with_=500, times=20)
    assert main(["publish", str(logic_run), "--repo-id", REPO, "--metric"]) == 2
    assert "Published before it: space org/hyla_logic_r2." in capsys.readouterr().err
    assert published(hub_here.repo(REPO)) == {}


def test_a_wrong_or_missing_token_or_organisation_is_reported_in_a_sentence(hub_here, logic_run, capsys, monkeypatch):
    for token, repo_id, message in [
        (hub_here.read_token, REPO, "may not write there"),
        (hub_here.token, "other/x", "may not write there"),
        ("hf_" + "wrong" * 8, REPO, "log in by"),
    ]:
        monkeypatch.setenv("HF_TOKEN", token)
        assert main(["publish", str(logic_run), "--repo-id", repo_id]) == 2
        error = capsys.readouterr().err
        assert message in error and token not in error
    assert hub_here.repos == {}


def test_push_to_hub_in_a_recipe_publishes_the_same_files_as_the_command(hub_here, trained, capsys):
    run = trained("logic", push_to_hub=True, hub_model_id=REPO, hub_private_repo=True)
    assert f"model {REPO}: published, " in capsys.readouterr().out
    repo = hub_here.repo(REPO)
    assert len(repo.commits) == 2 and repo.private
    assert published(repo) == contents(plan(Run.load(run), REPO)[0])
    assert published(repo)["README.md"].decode() == card_files(Run.load(run), REPO)["README.md"]
    assert "--trainer.push_to_hub false" in published(repo)["README.md"].decode()


def test_a_run_whose_recipe_says_private_stays_private_when_it_is_published_later(hub_here, logic_run, copied, capsys):
    record = json.loads((logic_run / "run.json").read_text())
    record["recipe"]["trainer"]["hub_private_repo"] = True
    run = copied(logic_run, recipe=record["recipe"])
    (run / "resolved_recipe.yaml").write_text(yaml.safe_dump(record["recipe"]))
    command = ["publish", str(run), "--repo-id", REPO]
    assert main(command) == 0 and hub_here.repo(REPO).private
    HfApi().delete_repo(REPO)
    assert main([*command, "--no-private"]) == 0 and not hub_here.repo(REPO).private
    head = hub_here.repo(REPO).head
    assert main(command) == 2 and hub_here.repo(REPO).head == head
    assert "is public already, so nothing was sent" in capsys.readouterr().err


def test_a_private_push_that_fails_advises_a_private_publication(hub_here, logic_run):
    hub_here.fail("commit/main", with_=500, times=20)
    with pytest.raises(OSError, match=f"`hyla publish {logic_run} --repo-id {REPO} --private` publishes it"):
        publish_run(logic_run, REPO, private=True)


@pytest.mark.parametrize(("request_", "fault"), [("commit/main", 500), ("validate-yaml", 503), ("validate-yaml", 400)])
def test_a_push_that_fails_says_how_to_publish_the_finished_run(hub_here, logic_run, copied, request_, fault):
    run = copied(logic_run)
    hub_here.fail(request_, with_=fault, times=20)
    with pytest.raises(OSError, match=f"finished; `hyla publish {run} --repo-id {REPO}` publishes it"):
        publish_run(run, REPO)


def test_a_recipe_that_could_not_be_pushed_is_refused_before_training(logic_run, tmp_path, monkeypatch):
    sections = yaml.safe_load((logic_run / "resolved_recipe.yaml").read_text())
    sections["trainer"] |= {"push_to_hub": True, "hub_model_id": REPO}
    (tmp_path / "push.yaml").write_text(yaml.safe_dump(sections))
    recipe = load_recipe(tmp_path / "push.yaml")

    def check():
        check_before_training(recipe.name, recipe.settings, recipe.task, recipe.config)

    monkeypatch.setattr("hf_hyla.hub.publish.environment", lambda: {"git_commit": "0" * 40})
    monkeypatch.setattr("hf_hyla.hub.publish.get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub needs a token"):
        check()
    monkeypatch.setattr("hf_hyla.hub.publish.get_token", lambda: "hf_x")
    check()
    monkeypatch.setattr("hf_hyla.hub.publish.environment", lambda: {"git_commit": "0" * 40 + "+changes"})
    with pytest.raises(ValueError, match="commit the changes"):
        check()
    monkeypatch.setattr("hf_hyla.hub.publish.environment", lambda: {"git_commit": "0" * 40})
    recipe.settings["model"]["model_name_or_path"] = str(logic_run)
    with pytest.raises(ValueError, match="which nobody else has: publish that model first"):
        check()


def test_a_private_push_to_a_public_repository_is_refused_before_training(hub_here, logic_run, monkeypatch):
    recipe = load_recipe(logic_run / "resolved_recipe.yaml")
    recipe.settings["trainer"] |= {"push_to_hub": True, "hub_model_id": REPO, "hub_private_repo": True}
    monkeypatch.setattr("hf_hyla.hub.publish.environment", lambda: {"git_commit": "0" * 40})

    def check():
        check_before_training(recipe.name, recipe.settings, recipe.task, recipe.config)

    check()  # there is no such repository yet
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match=r"is public already, but the recipe says trainer\.hub_private_repo: make it"):
        check()
    hub_here.fail("GET /api/models", with_=500, times=20)
    check()  # the Hub is asked again when the run is published
    hub_here.heal()
    HfApi().update_repo_settings(REPO, private=True)
    check()


def trainer_in(folder, args_class=HylaTrainingArguments, **settings):
    args = args_class(str(folder), report_to="none", **settings)
    task = get_task("logic", num_examples=4)
    return HylaTrainer(
        model=HylaForSequenceClassification.from_pretrained(folder.parent),
        args=args,
        train_dataset=task.dataset("train", 8),
        data_collator=task.collate,
    )


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
@pytest.mark.parametrize("arguments", [HylaTrainingArguments, TrainingArguments])
def test_a_trainer_with_push_to_hub_is_refused_before_it_trains(hub_here, logic_run, arguments, strategy):
    with pytest.raises(ValueError, match=r"would upload pickles .* publish the finished run by `hyla publish`"):
        trainer_in(
            logic_run / "checkpoints",
            arguments,
            eval_strategy="no",
            push_to_hub=True,
            hub_model_id=REPO,
            hub_strategy=strategy,
        )
    assert hub_here.requests == []


def test_a_trainer_sends_nothing_and_writes_no_card_of_its_own(hub_here, logic_run, copied):
    run = copied(logic_run)
    trainer = trainer_in(run / "out", hub_model_id=REPO, eval_strategy="no")
    with pytest.raises(ValueError, match="publishes nothing"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match="call `hyla card`"):
        trainer.create_model_card()
    assert hub_here.requests == []
    assert not list((run / "out").iterdir()) and not (run / "README.md").exists()


def test_an_error_that_is_not_the_hubs_is_raised_unchanged(hub_here, logic_run, copied):
    run = copied(logic_run)
    repositories = plan(Run.load(run), REPO)
    (run / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="not a file on the local file system"):
        publish(repositories)
