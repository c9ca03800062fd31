"""A Hub on loopback: as much of its API as an upload needs, over HTTP, with failures at will.

    with HubServer() as hub:
        hub.fail("PUT /lfs/", status=503)           # the first such request, once
        subprocess.run([...], env={**os.environ, **hub.environment(), "HF_TOKEN": TOKEN})
        hub.repos["model", "me/mine"].files["README.md"]

It speaks the requests that huggingface_hub 1.x makes: create, preupload, Git LFS's batch and basic transfer, commit,
repository info, validation of a card's metadata, and Xet's token. It is strict where the Hub is: no token, no answer;
an LFS file that was not uploaded can't be committed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopbackSecretOfNoAccount"
SIGNATURE = "X-Amz-Signature=5ecre7"  # in the addresses that files are put to, as a storage's are signed
LFS_SUFFIXES = (".safetensors", ".parquet")
HIDDEN_FOLDERS = {"model": "", "dataset": "datasets/"}


@dataclass
class Repo:
    """A repository's head."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: dict[str, str] = field(default_factory=dict)  # path → SHA-256, of those that are in the store
    commits: list[str] = field(default_factory=list)


@dataclass
class Failure:
    """What the next request of a kind gets in place of an answer."""

    request: str  # how "METHOD /path" begins
    status: int | None  # None: the connection is cut


class HubServer:
    """Serves from a thread of this process for as long as the `with` block runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.reset()

    def reset(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}  # SHA-256 → content
        self.cards: dict[str, dict[str, Any]] = {}  # metadata of models that are there already
        self.commits: dict[str, str] = {}  # and the commits that their revisions stand for, if not asked for by it
        self.requests: list[str] = []  # "METHOD /path", without queries
        self.unwritable: set[str] = set()  # owners
        self.xet_store: str | None = None  # where Xet's client is sent to
        self._failures: list[Failure] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Variables that send the client here, and nowhere else; the token is its user's."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, request: str, *, status: int | None) -> None:
        self._failures.append(Failure(request, status))

    def failure(self, request: str) -> Failure | None:
        with self._lock:
            self.requests.append(request)
            for failure in self._failures:
                if request.startswith(failure.request):
                    self._failures.remove(failure)
                    return failure
        return None

    def count(self, request: str) -> int:
        """How many requests began so."""
        return sum(made.startswith(request) for made in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        failure = self.hub.failure(f"{self.command} {path}")
        if failure is not None and failure.status is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if failure is not None:
            self._answer(failure.status or 0, {"error": "out of order"})
            return
        if not path.startswith("/lfs/") and self.headers.get("authorization") != f"Bearer {TOKEN}":
            # as a storage, /lfs/ trusts the address's signature
            self._answer(401, {"error": "Invalid username or password."})
            return
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                answer(self, body, **found.groupdict())
                return
        self._answer(404, {"error": "Not Found"})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, status: int, value: Any, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def _repo(self, kind: str, name: str) -> Repo | None:
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        return repo

    # --- what it serves ---

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name, kind = f"{asked['organization']}/{asked['name']}", asked.get("type", "model")
        where = {"url": f"{self.hub.url}/{HIDDEN_FOLDERS[kind]}{name}"}
        if asked["organization"] in self.hub.unwritable:
            self._answer(403, {"error": f"You don't have the rights to create a {kind} under this namespace"})
        elif (kind, name) in self.hub.repos:
            self._answer(409, {"error": f"You already created this {kind} repo", **where})
        else:
            self.hub.repos[kind, name] = Repo(
                private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self._answer(200, where)

    def validate(self, body: bytes) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError as error:
            self._answer(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        wrong = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
        self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def info(self, _body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        if kind == "model" and name in self.hub.cards:
            self._answer(
                200, {"id": name, "sha": self.hub.commits.get(name, revision), "cardData": self.hub.cards[name]}
            )
            return
        repo = self._repo(kind, name)
        if repo is not None:
            sha = repo.commits[-1] if repo.commits else "0" * 40
            self._answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": [], "tags": []})

    def tree(self, _body: bytes, kind: str, name: str, **_: str) -> None:
        repo = self._repo(kind, name)
        if repo is not None:
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
                for path, content in repo.files.items()
            ]
            self._answer(200, files)

    def preupload(self, body: bytes, kind: str, name: str, **_: str) -> None:
        repo = self._repo(kind, name)
        if repo is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            oid = repo.lfs.get(path) or (_git_hash(repo.files[path]) if path in repo.files else None)
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def batch(self, body: bytes, **_: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}?{SIGNATURE}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if SIGNATURE not in self.path or hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "bad signature or digest"})
            return
        self.hub.store[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, kind: str, name: str, **_: str) -> None:
        repo = self._repo(kind, name)
        if repo is None:
            return
        header, *operations = (json.loads(line) for line in body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and (value["oid"] in self.hub.store or self.hub.xet_store is not None):
                repo.files[value["path"]] = self.hub.store.get(value["oid"], b"")
                repo.lfs[value["path"]] = value["oid"]
            elif operation["key"] == "deletedFile":
                repo.files.pop(value["path"])
            else:
                self._answer(400, {"error": f"{value['path']} was not uploaded"})
                return
        repo.commits.append(hashlib.sha1(body).hexdigest())
        address = f"{self.hub.url}/{HIDDEN_FOLDERS[kind]}{name}/commit/{repo.commits[-1]}"
        self._answer(200, {"success": True, "commitOid": repo.commits[-1], "commitUrl": address, **header["value"]})

    def xet_token(self, _body: bytes, **_: str) -> None:
        if self.hub.xet_store is None:
            self._answer(404, {"error": "no Xet here"})
            return
        expires = 4_000_000_000
        self._answer(
            200,
            {"casUrl": self.hub.xet_store, "exp": expires, "accessToken": "xet"},
            **{
                "X-Xet-Cas-Url": self.hub.xet_store,
                "X-Xet-Token-Expiration": str(expires),
                "X-Xet-Access-Token": "xet",
            },
        )


_REPO = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", _REPO, _Handler.info),
    ("GET", _REPO + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", _REPO + r"/xet-write-token/(?P<revision>[^/]+)", _Handler.xet_token),
    ("GET", _REPO + r"/tree/(?P<revision>[^/?]+).*", _Handler.tree),
    ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", r"/(?P<folder>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
]


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
