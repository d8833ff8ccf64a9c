"""
The calls of the Hub that huggingface_hub, transformers and datasets make, over repositories in memory.

Each function of `ROUTES` takes the request, whose server is `request.hub`, and the parts of the path; it returns what
is sent as JSON, or (status, headers, content), or raises `Refused`.
"""

import base64
import dataclasses
import fnmatch
import hashlib
import json
import re
from pathlib import PurePosixPath
from urllib.parse import parse_qs

import yaml


DATE = "2026-01-01T00:00:00.000Z"
LFS_PATTERNS = (
    "*.arrow *.bin *.ckpt *.gz *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.png *.pt *.pth *.safetensors *.zip"
)
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split()
).encode()


class Refused(Exception):
    """A request that is answered with an error; `code` is what the Hub puts into X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message} | body
        self.headers = {"X-Error-Message": message} | (headers or {}) | ({"X-Error-Code": code} if code else {})


@dataclasses.dataclass(frozen=True)
class Blob:
    """The content of a file; files in large-file storage are known by their SHA-256, others by git's hash."""

    data: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else _git_hash(self.data)

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.etag}
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(self.data)}\n"
            entry["oid"] = _git_hash(pointer.encode())
            entry["lfs"] = {"oid": self.etag, "size": len(self.data), "pointerSize": len(pointer)}
        return entry


@dataclasses.dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    tree: dict[str, Blob]


class Repo:
    """A repository: commits that never change, and names (branches, tags) that point to them."""

    def __init__(self, repo_type: str, repo_id: str, private: bool = False):
        self.repo_type, self.repo_id, self.private = repo_type, repo_id, private
        self.commits: list[Commit] = []
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES, False)})

    @property
    def head(self) -> str:
        return self.branches["main"]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: blob.data for path, blob in self.at(revision).tree.items()}

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, title: str, tree: dict[str, Blob]) -> Commit:
        content = [self.repo_type, self.repo_id, len(self.commits), title, [(p, b.etag) for p, b in tree.items()]]
        commit = Commit(hashlib.sha1(json.dumps(content).encode()).hexdigest(), title, dict(sorted(tree.items())))
        self.commits.append(commit)
        self.branches[branch] = commit.sha
        return commit

    def uses_lfs(self, path: str, sample: bytes, size: int) -> bool:
        attributes = self.at("main").tree.get(".gitattributes", Blob(b"", False)).data.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        name = path.rpartition("/")[2]
        return size > 10 * 2**20 or b"\0" in sample or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _whoami(request):
    if request.who is None:
        raise Refused(401, "Invalid username or password.")
    role = "write" if request.may_write else "read"
    orgs = [{"name": name, "type": "org", "roleInOrg": role} for name in request.hub.namespaces[1:]]
    return {"type": "user", "name": request.who, "orgs": orgs, "auth": {"accessToken": {"role": role}}}


def _create(request):
    asked = request.json()
    repo_id = f"{asked.get('organization') or request.who}/{asked['name']}"
    request.check_writes(repo_id)
    key = asked.get("type") or "model", repo_id
    url = f"{request.hub.endpoint}/{'' if key[0] == 'model' else key[0] + 's/'}{repo_id}"
    if key in request.hub.repos:
        raise Refused(409, "You already created this repo", url=url)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    request.hub.repos[key] = Repo(*key, private)
    return {"url": url, "name": repo_id, "id": repo_id}


def _delete(request):
    asked = request.json()
    repo = request.find(asked.get("type") or "model", f"{asked.get('organization') or request.who}/{asked['name']}")
    request.check_writes(repo.repo_id)
    del request.hub.repos[repo.repo_type, repo.repo_id]
    return {}


def _validate_yaml(request):
    return {"errors": [], "warnings": _check_card(request.json()["content"])}


def _check_card(content: str) -> list[dict[str, str]]:
    """Warnings about a README's metadata; refused where its YAML is none or a field has a value that is not allowed."""
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        metadata = str(error)
    problem = None
    if not isinstance(metadata, dict):
        problem = f"Invalid YAML: {metadata}"
    elif not isinstance(metadata.get("tags", []), list):
        problem = '"tags" must be an array'
    elif "license" in metadata and not re.fullmatch(r"[a-z0-9.\-]+", str(metadata["license"])):
        problem = '"license" must be one of the known identifiers'
    if problem:
        raise Refused(400, "Invalid metadata in README.md", errors=[{"message": problem}], warnings=[])
    return [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]


def _preupload(request, repo, revision):
    tree = repo.at(revision).tree
    files = []
    for file in request.json()["files"]:
        uses_lfs = repo.uses_lfs(file["path"], base64.b64decode(file["sample"]), file["size"])
        answer = {"path": file["path"], "uploadMode": "lfs" if uses_lfs else "regular", "shouldIgnore": False}
        files.append(answer | ({"oid": tree[file["path"]].etag} if file["path"] in tree else {}))
    return {"files": files}


def _lfs_batch(request, repo):
    objects = []
    for asked in request.json()["objects"]:
        known = asked["oid"] in request.hub.stored
        base = f"{request.hub.endpoint}/storage/{asked['oid']}"
        actions = {"upload": {"href": base, "header": {}}, "verify": {"href": f"{base}/verify", "header": {}}}
        objects.append({"oid": asked["oid"], "size": asked["size"]} | ({} if known else {"actions": actions}))
    return {"transfer": "basic", "objects": objects}


def _put(request, oid):
    """Storage takes no token, only the address that the batch call gave away."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "The content does not have the announced hash.")
    request.hub.stored[oid] = request.body
    return {}


def _verify(request, oid):
    if len(request.hub.stored.get(oid, b"")) != request.json()["size"]:
        raise Refused(404, "The object was not uploaded.")
    return {}


def _commit(request, repo, revision):
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    if revision not in repo.branches:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    parent = header["value"].get("parentCommit")
    if parent and parent != repo.branches[revision]:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(repo.at(revision).tree)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        if kind == "file":
            tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            if value["oid"] not in request.hub.stored:
                raise Refused(400, f"The object of {value['path']} was not uploaded.")
            tree[value["path"]] = Blob(request.hub.stored[value["oid"]], True)
        else:
            gone = [p for p in tree if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")]
            if not gone or (kind == "deletedFile" and gone != [value["path"]]):
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for path in gone:
                del tree[path]
    if "README.md" in tree:
        _check_card(tree["README.md"].data.decode())
    commit = repo.commit(revision, header["value"]["summary"], tree)
    prefix = "" if repo.repo_type == "model" else f"{repo.repo_type}s/"
    url = f"{request.hub.endpoint}/{prefix}{repo.repo_id}/commit/{commit.sha}"
    return {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""}


def _info(request, repo, revision="main"):
    commit = repo.at(revision)
    blobs = "blobs" in request.query
    siblings = []
    for path, blob in commit.tree.items():
        entry = blob.describe(path)
        lfs = {"lfs": {"sha256": blob.etag, **entry["lfs"]}} if blob.is_lfs else {}
        siblings.append(
            {"rfilename": path} | ({"size": entry["size"], "blobId": entry["oid"], **lfs} if blobs else {})
        )
    card = re.match(r"---\n(.*?)\n---", repo.files(revision).get("README.md", b"").decode(), flags=re.DOTALL)
    card_data = yaml.safe_load(card[1]) if card else {}
    return {
        "_id": repo.repo_id, "id": repo.repo_id, "modelId": repo.repo_id, "author": repo.repo_id.partition("/")[0],
        "sha": commit.sha, "private": repo.private, "disabled": False, "gated": False, "lastModified": DATE,
        "createdAt": DATE, "downloads": 0, "likes": 0, "tags": card_data.get("tags") or [], "cardData": card_data,
        "siblings": siblings,
        **{name: card_data[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card_data},
    }  # fmt: skip


def _tree(request, repo, revision, path=""):
    tree = repo.at(revision).tree
    folders = {str(parent) for name in tree for parent in PurePosixPath(name).parents} - {"."}
    if path and path not in folders:
        raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
    entries = [_folder(name) for name in sorted(folders)] + [blob.describe(name) for name, blob in tree.items()]
    start = f"{path}/" if path else ""
    inside = [entry for entry in entries if entry["path"].startswith(start)]
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    return [entry for entry in inside if recursive or "/" not in entry["path"][len(start) :]]


def _folder(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": _git_hash(path.encode())}


def _paths_info(request, repo, revision):
    tree = repo.at(revision).tree
    if request.headers.get("Content-Type", "").startswith("application/json"):
        asked = request.json()["paths"]
    else:
        asked = parse_qs(request.body.decode()).get("paths", [])
    entries = []
    for path in asked:
        if path in tree:
            entries.append(tree[path].describe(path))
        elif any(name.startswith(f"{path}/") for name in tree):
            entries.append(_folder(path))
    return entries


def _refs(request, repo):
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
    return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}


def _commits(request, repo, revision):
    commits = repo.commits[: repo.commits.index(repo.at(revision)) + 1]
    author = {"user": request.hub.user}
    return [{"id": c.sha, "authors": [author], "date": DATE, "title": c.title, "message": ""} for c in commits[::-1]]


def _tag(request, repo, revision):
    name = request.json()["tag"]
    if name in repo.tags:
        raise Refused(409, f"Tag {name} exists already")
    repo.tags[name] = repo.at(revision).sha
    return {}


def _settings(request, repo):
    repo.private = request.json().get("visibility", "private" if repo.private else "public") == "private"
    return {}


def _resolve(request, repo, revision, path):
    commit = repo.at(revision)
    known = {"X-Repo-Commit": commit.sha}
    if path not in commit.tree:
        raise Refused(404, "Entry not found", "EntryNotFound", headers=known)
    blob = commit.tree[path]
    size = len(blob.data)
    headers = known | {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if blob.is_lfs:
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return 200, headers | {"Content-Length": str(size)}, blob.data
    first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first > last:
        raise Refused(416, f"{path} has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, blob.data[first : last + 1]


def _new_collection(request):
    asked = request.json()
    request.check_writes(f"{asked['namespace']}/")
    name = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
    slug = f"{asked['namespace']}/{name}-{hashlib.sha1(name.encode()).hexdigest()[:24]}"
    if slug in request.hub.collections:
        raise Refused(409, "Collection already exists", slug=slug)
    request.hub.collections[slug] = {
        "slug": slug, "title": asked["title"], "owner": asked["namespace"], "description": asked.get("description"),
        "items": [], "lastUpdated": DATE, "position": 0, "private": asked.get("private", False), "theme": "blue",
        "upvotes": 0,
    }  # fmt: skip
    return request.hub.collections[slug]


def _collection(request, slug):
    if slug not in request.hub.collections:
        raise Refused(404, "Collection not found")
    return request.hub.collections[slug]


def _list_collections(request):
    owner = request.query.get("owner")
    return [found for found in request.hub.collections.values() if owner in (None, found["owner"])]


def _change_collection(request, slug):
    _collection(request, slug).update(request.json())
    return {"success": True, "data": _collection(request, slug)}


def _delete_collection(request, slug):
    _collection(request, slug)
    del request.hub.collections[slug]
    return {}


def _add_item(request, slug):
    items, asked = _collection(request, slug)["items"], request.json()
    item = asked["item"]
    if item["type"] in ("model", "dataset", "space"):
        request.find(item["type"], item["id"])
    if any((known["type"], known["id"]) == (item["type"], item["id"]) for known in items):
        raise Refused(409, "Item already in collection")
    note = {"note": {"html": asked["note"], "text": asked["note"]}} if "note" in asked else {}
    items.append({"_id": f"{len(items):024x}", "position": len(items), **item, **note})
    return _collection(request, slug)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_KIND, _REPO, _REV = "/api/(?P<kind>models|datasets|spaces)", "(?P<repo>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
_SLUG = "(?P<slug>[^/]+/[^/]+)"
# Methods, path, function.
ROUTES = (
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("DELETE", "/api/repos/delete", _delete),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", "/api/collections", _list_collections),
    ("POST", "/api/collections", _new_collection),
    ("GET", f"/api/collections/{_SLUG}", _collection),
    ("PATCH", f"/api/collections/{_SLUG}", _change_collection),
    ("DELETE", f"/api/collections/{_SLUG}", _delete_collection),
    ("POST", f"/api/collections/{_SLUG}/items", _add_item),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _put),
    ("POST", "/storage/(?P<oid>[0-9a-f]{64})/verify", _verify),
    ("POST", f"/(?P<kind>datasets/|spaces/)?{_REPO}.git/info/lfs/objects/batch", _lfs_batch),
    ("GET", f"{_KIND}/{_REPO}", _info),
    ("GET", f"{_KIND}/{_REPO}/revision/{_REV}", _info),
    ("POST", f"{_KIND}/{_REPO}/preupload/{_REV}", _preupload),
    ("POST", f"{_KIND}/{_REPO}/commit/{_REV}", _commit),
    ("GET", f"{_KIND}/{_REPO}/commits/{_REV}", _commits),
    ("GET", f"{_KIND}/{_REPO}/tree/{_REV}(/(?P<path>.+))?", _tree),
    ("POST", f"{_KIND}/{_REPO}/paths-info/{_REV}", _paths_info),
    ("GET", f"{_KIND}/{_REPO}/refs", _refs),
    ("POST", f"{_KIND}/{_REPO}/tag/{_REV}", _tag),
    ("PUT", f"{_KIND}/{_REPO}/settings", _settings),
    ("GET HEAD", f"/(?P<kind>datasets/|spaces/)?{_REPO}/resolve/{_REV}/(?P<path>.+)", _resolve),
)
# Requests that change nothing, or need no token, although they are no GET.
OPEN_TO_ALL = (_paths_info, _put)
