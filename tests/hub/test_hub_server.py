"""Tests of the loopback Hub: it answers huggingface_hub and datasets as the Hub does, and produces faults on request."""

import hashlib
import os
import sys

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session


# huggingface_hub below 2 talks by httpx, later ones by httpx2.
httpx = sys.modules[type(get_session()).__module__.partition(".")[0]]
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def api(hub_here):
    return HfApi(token=hub_here.token)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "model" / "README.md").write_text("---\ntags: [hyla]\nlicense: apache-2.0\n---\n# A model\n")
    (tmp_path / "model" / "sub" / "plain.txt").write_text("text")
    return tmp_path / "model"


@pytest.fixture
def repo(api, hub_here, folder):
    """A published folder."""
    api.create_repo("org/it")
    api.upload_folder(repo_id="org/it", folder_path=folder)
    return hub_here.repo("org/it")


def test_another_process_can_upload_pin_download_and_delete(hub, folder):
    printed = hub.run(
        f"""
        from pathlib import Path
        from huggingface_hub import HfApi, constants, hf_hub_download, list_repo_files, snapshot_download
        assert constants.HF_HUB_DISABLE_XET
        api = HfApi()
        assert api.whoami()["name"] == "tester"
        api.create_repo("org/it")
        first = api.upload_folder(repo_id="org/it", folder_path={str(folder)!r}).oid
        api.upload_file(repo_id="org/it", path_or_fileobj=b"changed", path_in_repo="sub/plain.txt")
        api.create_tag("org/it", tag="v1", revision=first)
        print(sorted(list_repo_files("org/it")))
        for revision in (first, "v1", "main"):
            print(Path(hf_hub_download("org/it", "sub/plain.txt", revision=revision)).read_text())
        print(sorted(p.name for p in Path(snapshot_download("org/it", revision="v1")).rglob("*") if p.is_file()))
        api.delete_file("sub/plain.txt", "org/it")
        assert not api.file_exists("org/it", "sub/plain.txt")
        assert [c.title for c in api.list_repo_commits("org/it")][-1] == "initial commit"
        api.delete_repo("org/it")
        assert not api.repo_exists("org/it")
        """,
        folder.parent,
        hub.token,
    )
    names = "['.gitattributes', 'README.md', 'model.safetensors', '{}plain.txt']"
    assert printed.splitlines() == [names.format("sub/"), "text", "text", "changed", names.format("")]


def test_load_dataset_reads_a_parquet_repository_at_a_revision(hub, tmp_path):
    printed = hub.run(
        """
        from datasets import Dataset, load_dataset
        first = Dataset.from_dict({"x": [1, 2, 3]}).push_to_hub("org/numbers", split="train")
        Dataset.from_dict({"x": [4]}).push_to_hub("org/numbers", split="train")
        Dataset.from_dict({"x": [5]}).push_to_hub("org/numbers", split="test")
        print(load_dataset("org/numbers", split="train")["x"][:], load_dataset("org/numbers")["test"]["x"][:])
        print(load_dataset("org/numbers", split="train", revision=first.oid)["x"][:])
        """,
        tmp_path,
        hub.token,
    )
    assert printed.splitlines() == ["[4] [5]", "[1, 2, 3]"]
    assert ("dataset", "org/numbers") in hub.repos


def test_files_come_with_the_commit_and_the_hash_that_clients_cache_by(repo, hub_here):
    url = f"{hub_here.endpoint}/org/it/resolve/main/model.safetensors"
    head = httpx.head(url)
    assert head.headers["X-Repo-Commit"] == repo.head and int(head.headers["Content-Length"]) == len(WEIGHTS)
    assert head.headers["ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    for asked, part in (("0-9", WEIGHTS[:10]), ("1000-", WEIGHTS[1000:]), ("-7", WEIGHTS[-7:])):
        answer = httpx.get(url, headers={"Range": f"bytes={asked}"})
        assert answer.status_code == 206 and answer.content == part
    assert httpx.get(url, headers={"Range": "bytes=999999-"}).status_code == 416
    for path, code in (("main/none", "EntryNotFound"), ("none/README.md", "RevisionNotFound")):
        answer = httpx.get(f"{hub_here.endpoint}/org/it/resolve/{path}")
        assert answer.status_code == 404 and answer.headers["X-Error-Code"] == code


def test_all_endpoints_agree_about_a_repository(api, repo):
    info = api.model_info("org/it", files_metadata=True)
    assert info.sha == repo.head and info.tags == ["hyla"] and info.card_data.license == "apache-2.0"
    sizes = {file.rfilename: (file.size, file.blob_id, file.lfs is not None) for file in info.siblings}
    tree = list(api.list_repo_tree("org/it", recursive=True))
    assert {e.path: (e.size, e.blob_id, e.lfs is not None) for e in tree if hasattr(e, "size")} == sizes
    assert sizes["model.safetensors"][2] and not sizes["sub/plain.txt"][2]
    assert {entry.path for entry in api.list_repo_tree("org/it")} == set(sizes) - {"sub/plain.txt"} | {"sub"}
    assert [entry.path for entry in api.list_repo_tree("org/it", "sub")] == ["sub/plain.txt"]
    assert [entry.path for entry in api.get_paths_info("org/it", ["sub", "README.md", "none"])] == ["sub", "README.md"]
    assert api.list_repo_refs("org/it").branches[0].target_commit == repo.head


def test_an_unchanged_folder_makes_no_commit(api, repo, folder, hub_here):
    before = len(repo.commits)
    assert api.upload_folder(repo_id="org/it", folder_path=folder).oid == repo.head
    assert len(repo.commits) == before and sum(request.startswith("PUT") for request in hub_here.requests) == 1


def test_a_commit_is_applied_completely_or_not_at_all(api, repo):
    before = repo.files()
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("none.txt")]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit("org/it", operations, commit_message="half")
    assert repo.files() == before
    api.create_commit("org/it", [CommitOperationDelete("sub/", is_folder=True)], commit_message="folder")
    assert set(before) - set(repo.files()) == {"sub/plain.txt"}


def test_a_commit_on_a_stale_parent_is_refused(api, repo):
    parent = repo.head
    new = [CommitOperationAdd("new.txt", b"new")]
    api.create_commit("org/it", new, commit_message="first", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="412"):
        again = [CommitOperationAdd("new.txt", b"newer")]
        api.create_commit("org/it", again, commit_message="second", parent_commit=parent)
    assert repo.files()["new.txt"] == b"new"


@pytest.mark.parametrize("card", ["---\ntags: hyla\n---\n", "---\na: [\n---\n", "---\nlicense: My Own\n---\n"])
def test_invalid_metadata_is_refused(api, repo, card):
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id="org/it", path_or_fileobj=card.encode(), path_in_repo="README.md")


def test_a_repository_is_created_once_and_only_where_the_user_may_write(api, repo, hub_here):
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/it")
    assert api.create_repo("org/it", exist_ok=True).repo_id == "org/it"
    api.create_repo("org/it", repo_type="dataset")
    api.create_repo("it", repo_type="space", space_sdk="gradio")
    assert set(hub_here.repos) == {("model", "org/it"), ("dataset", "org/it"), ("space", "tester/it")}
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("elsewhere/it")


def test_tokens_are_checked(repo, hub_here):
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=hub_here.read_token).upload_file(repo_id="org/it", path_or_fileobj=b"", path_in_repo="x")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").model_info("org/it")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_repo("org/other")
    HfApi(token=hub_here.token).update_repo_settings("org/it", private=True)
    assert HfApi(token=hub_here.read_token).model_info("org/it").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("org/it")
    assert not any("hf_" in request for request in hub_here.requests)


def test_revisions_that_do_not_exist_are_refused(repo, tmp_path):
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/it", "README.md", revision="v9", cache_dir=tmp_path)


def test_collections_hold_existing_repositories_once(api, repo, hub_here):
    collection = api.create_collection("HYLA models", namespace="org", description="all")
    assert api.create_collection("HYLA models", namespace="org", exists_ok=True).slug == collection.slug
    api.add_collection_item(collection.slug, "org/it", "model", note="first")
    api.add_collection_item(collection.slug, "org/it", "model", exists_ok=True)
    items = api.get_collection(collection.slug).items
    assert [(item.item_id, item.item_type, item.note) for item in items] == [("org/it", "model", "first")]
    with pytest.raises(HfHubHTTPError, match="404"):
        api.add_collection_item(collection.slug, "org/none", "dataset")
    api.delete_collection(collection.slug)
    assert not hub_here.collections


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_faulty_status_is_returned_as_often_as_requested_and_changes_nothing(api, repo, hub_here, status):
    before = repo.files()
    hub_here.fail("POST .*/commit/", with_=status, times=1)
    new = [CommitOperationAdd("new.txt", b"new")]
    with pytest.raises(HfHubHTTPError, match=str(status)):
        api.create_commit("org/it", new, commit_message="new")
    assert repo.files() == before
    api.create_commit("org/it", [CommitOperationAdd("new.txt", b"new")], commit_message="new")
    assert repo.files() == before | {"new.txt": b"new"}


def test_a_connection_cut_during_an_upload_is_retried_or_fails(api, repo, hub_here):
    def upload():
        api.upload_file(repo_id="org/it", path_or_fileobj=os.urandom(1 << 20), path_in_repo="big.safetensors")

    before = repo.files()
    hub_here.fail("PUT /storage/", with_="cut", times=6)
    with pytest.raises((RuntimeError, httpx.TransportError)):
        upload()
    assert repo.files() == before
    hub_here.fail("PUT /storage/", with_="cut", times=1)
    upload()
    assert len(repo.files()["big.safetensors"]) == 1 << 20


def test_a_commit_whose_answer_is_lost_has_been_made(api, repo, hub_here):
    hub_here.fail("POST .*/commit/", with_="lost answer")
    with pytest.raises(httpx.TransportError):
        api.upload_file(repo_id="org/it", path_or_fileobj=b"new", path_in_repo="new.txt")
    assert repo.files()["new.txt"] == b"new"


def test_a_commit_of_another_user_just_before_is_refused_as_stale(api, repo, hub_here):
    hub_here.fail("POST .*/commit/", with_="stale")
    with pytest.raises(HfHubHTTPError, match="412"):
        new = [CommitOperationAdd("new.txt", b"new")]
        api.create_commit("org/it", new, commit_message="new", parent_commit=repo.head)
    assert "else.txt" in repo.files() and "new.txt" not in repo.files()


def test_an_interrupted_download_resumes_where_it_stopped(repo, hub_here, tmp_path):
    hub_here.fail("GET .*model.safetensors", with_="cut")
    path = snapshot_download("org/it", cache_dir=tmp_path / "again")
    with open(f"{path}/model.safetensors", "rb") as file:
        assert file.read() == WEIGHTS
    assert sum("GET" in request and "model.safetensors" in request for request in hub_here.requests) == 2


def test_a_request_with_a_slow_answer_is_repeated(repo, hub_here, tmp_path):
    hub_here.slow_seconds = 0.4
    hub_here.fail("HEAD", with_="slow")
    hf_hub_download("org/it", "README.md", cache_dir=tmp_path / "again", etag_timeout=0.1)
    assert sum("HEAD" in request for request in hub_here.requests) == 2


def test_an_unknown_fault_is_refused(hub):
    with pytest.raises(ValueError, match="with_ must be"):
        hub.fail("GET", with_="cot")
