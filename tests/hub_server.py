"""A Hub on this machine, for tests: repositories in memory, served over HTTP, with faults on demand."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_api import OPEN_TO_ALL, ROUTES, Blob, Refused, Repo


FAULTS = ("cut", "lost answer", "slow", "stale")


class HubServer:
    """
    A context manager that serves repositories and collections on 127.0.0.1 while it is open.

    `token` may write in the namespaces `tester` and `org`, `read_token` may only read there. `requests` lists what was
    asked, as `"METHOD /path"`.
    """

    token, read_token = "hf_loopbackwrite", "hf_loopbackread"
    user, namespaces = "tester", ("tester", "org")

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.slow_seconds = 1.0
        self.lock = threading.RLock()
        self._faults: list[dict] = []

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def fail(self, pattern: str, with_: int | str, times: int = 1, after: int = 0) -> None:
        """
        Makes the next `times` requests whose `"METHOD /path"` matches the pattern fail, leaving out the first `after`.

        `with_` is a status such as 503, whose request is not carried out; `"cut"`, the connection breaks in the middle
        of the upload, or of the answer where nothing is uploaded; `"lost answer"`, it breaks after the request was
        carried out; `"slow"`, the answer comes after `slow_seconds`; or `"stale"`, somebody else commits just before.
        """
        if not isinstance(with_, int) and with_ not in FAULTS:
            raise ValueError(f"with_ must be a status or one of {FAULTS}, got {with_!r}.")
        self._faults.append({"pattern": pattern, "with": with_, "times": times, "after": after})

    def heal(self) -> None:
        """Forgets the faults that have not come about."""
        self._faults.clear()

    def take_fault(self, request: str) -> int | str | None:
        with self.lock:
            self.requests.append(request)
            for fault in self._faults:
                if re.search(fault["pattern"], request) and fault["times"]:
                    if fault["after"]:
                        fault["after"] -= 1
                        continue
                    fault["times"] -= 1
                    return fault["with"]
        return None

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables with which a process talks to this Hub and to no other, and keeps its files under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": token}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return kept | quiet | {name: value for name, value in ours.items() if value is not None}

    def run(self, script: str, home: Path, token: str | None = None) -> str:
        """What a Python script prints that runs in a process of its own, in the folder `home`; it must succeed."""
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], env=self.environment(home, token), cwd=home,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout


class _Handler(BaseHTTPRequestHandler):
    """One connection; requests are answered by the functions of `ROUTES`."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer, written in two parts, waits 40 ms for the client

    def serve(self) -> None:
        url = urlsplit(self.path)
        fault = self.hub.take_fault(f"{self.command} {url.path}")
        length = int(self.headers.get("Content-Length", 0))
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        if fault == "cut" and (length or chunked or self.command == "HEAD"):
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.read_chunks() if chunked else self.rfile.read(length)
        if fault == "slow":
            threading.Event().wait(self.hub.slow_seconds)
        try:
            if isinstance(fault, int):
                raise Refused(fault, f"The server was told to answer {fault}.")
            status, headers, content = self.answer(url, somebody_commits=fault == "stale")
        except Refused as refused:
            status, content = refused.status, json.dumps(refused.body).encode()
            headers = {"Content-Type": "application/json", **refused.headers}
            if fault == 503:  # comes from a gateway, which knows nothing of JSON
                headers, content = {"Content-Type": "text/html"}, b"<html><body>Service Unavailable</body></html>"
        if fault == "lost answer":
            return self.hang_up()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def answer(self, url, somebody_commits: bool) -> tuple[int, dict[str, str], bytes]:
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.who, self.may_write = self.sender()
        for methods, pattern, function in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in methods.split():
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    if "repo" in parts:
                        parts["repo"] = self.find(parts.pop("kind", "models"), parts["repo"])
                        if somebody_commits:
                            tree = parts["repo"].at("main").tree
                            parts["repo"].commit("main", "meanwhile", tree | {"else.txt": Blob(b"else", False)})
                    if self.command not in ("GET", "HEAD") and function not in OPEN_TO_ALL:
                        self.check_writes(parts["repo"].repo_id if "repo" in parts else None)
                    answer = function(self, **parts)
                if isinstance(answer, tuple):
                    return answer
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        raise Refused(404, f"{self.command} {url.path} is not served here.")

    def sender(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None, False
        if token not in (self.hub.token, self.hub.read_token):
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.user, token == self.hub.token

    def check_writes(self, name: str | None) -> None:
        if self.who is None:
            raise Refused(401, "Invalid username or password.")
        if not self.may_write or (name and name.partition("/")[0] not in self.hub.namespaces):
            raise Refused(403, "You don't have the rights to write here with this token")

    def find(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind.rstrip("/").removesuffix("s"), repo_id))
        if repo is None or (repo.private and self.who is None):
            # The Hub does not tell strangers whether a repository exists.
            raise Refused(404 if self.who else 401, "Repository not found", "RepoNotFound")
        return repo

    def json(self) -> dict:
        return json.loads(self.body)

    def read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().strip(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        pass
