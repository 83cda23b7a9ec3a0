"""A Hub on localhost: as much of its HTTP protocol as publishing a model and loading it back need, and its failures.

It is written against huggingface_hub 1.33 and 2.4, and speaks the LFS protocol (clients set HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import HFValidationError, validate_repo_id

USERS = {"hf_owner": "someone", "hf_reader": "reader"}  # token -> user; only the owner may write
LFS_SUFFIXES = (".safetensors", ".flac", ".wav", ".png", ".bin", ".pt")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other")


@dataclass(frozen=True)
class Blob:
    """Content of a file, and whether it is stored as a large file."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What git would call it; of a large file, its pointer."""
        content = self.content
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass
class Repo:
    """Commits of one repository: commit -> path -> file."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], branch: str = "main") -> str:
        """Puts a commit on top of a branch."""
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}\n{self.branches.get(branch)}\n{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's name stands for."""
        named = {**{oid: oid for oid in self.commits}, **self.tags, **self.branches}
        return named.get(revision)


class HubServer:
    """The server, what it stores, and switches for what may go wrong.

    Attributes:
        url: what HF_ENDPOINT is set to.
        repos: repositories by name.
        large_files: content of uploaded large files by sha256, committed or not.
        requests: method and path of every request.
        uploads_before_failure: so many uploads of large files arrive, then connections break in their middle.
        before_commit: called once before the next commit is looked at.
        lose_commit_response: the next commit is made, but the connection breaks before the client hears of it.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads_before_failure: int | None = None
        self.before_commit: Callable[[], None] | None = None
        self.lose_commit_response = False
        self.lock = threading.Lock()
        server = self

        class Bound(Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def paths(self, method: str, part: str = "") -> list[str]:
        """Paths of the requests so far that have `part` in them."""
        return [path for verb, path in self.requests if verb == method and part in path]

    def may_upload(self) -> bool:
        """Counts an upload of a large file; false once they are to fail."""
        with self.lock:
            if self.uploads_before_failure is None:
                return True
            self.uploads_before_failure -= 1
            return self.uploads_before_failure >= 0


@contextmanager
def serving_in_thread(http: ThreadingHTTPServer) -> Iterator[None]:
    """Lets a server answer inside the context; each connection has its thread."""
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server on a free port, in threads of this process."""
    hub = HubServer()
    with serving_in_thread(hub.http):
        yield hub


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests' output clean."""

    def do_GET(self) -> None:  # noqa: N802
        self.route("GET")

    def do_HEAD(self) -> None:  # noqa: N802
        self.route("HEAD")

    def do_POST(self) -> None:  # noqa: N802
        self.route("POST")

    def do_PUT(self) -> None:  # noqa: N802
        self.route("PUT")

    def route(self, method: str) -> None:
        """Finds the action of a request."""
        path = urlsplit(self.path).path
        self.hub.requests.append((method, path))
        for verb, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == ("GET" if method == "HEAD" else method):
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return action(self, **arguments)
        return self.fail(404, f"no route for {method} {path}")

    def body(self) -> bytes:
        """The whole request body, whether its length is known or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json(self) -> Any:
        return json.loads(self.body())

    def reply(self, content: Any, status: int = 200, **headers: Any) -> None:
        """Sends JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, message: str, code: str | None = None, **headers: Any) -> None:
        """Sends an error as the Hub does."""
        extra = {"X_Error_Message": message, **({} if code is None else {"X_Error_Code": code}), **headers}
        self.reply({"error": message}, status, **extra)

    def hang_up(self) -> None:
        """Breaks the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(2)

    def user(self) -> str | None:
        """Who the token belongs to."""
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self) -> bool:
        """Refuses a request that is not the owner's."""
        user = self.user()
        if user is None:
            self.fail(401, "Invalid credentials in Authorization header")
        elif user != USERS["hf_owner"]:
            self.fail(403, f"{user} has no write access")
        return user == USERS["hf_owner"]

    def found(self, repo_id: str, revision: str = "main") -> tuple[Repo, str] | None:
        """A repository and a commit of it, or an answer that there is none."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user() is None):
            return self.fail(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        commit = repo.resolve(revision)
        if commit is None:
            return self.fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def whoami(self) -> None:
        if self.user() is None:
            return self.fail(401, "Invalid credentials in Authorization header")
        return self.reply({"type": "user", "name": self.user(), "orgs": []})

    def create_repo(self) -> None:
        wanted = self.json()
        if not self.may_write():
            return None
        repo_id = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.reply({**url, "error": "You already created this model repo"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.hub.repos[repo_id] = Repo(private=bool(private))
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", is_lfs=False)})
        return self.reply(url)

    def validate_yaml(self) -> None:
        errors = [{"message": message} for message in card_errors(self.json()["content"])]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self.json()["files"]
        if not self.may_write() or (found := self.found(repo_id, revision)) is None:
            return
        here = found[0].commits[found[1]]
        self.reply(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": here[file["path"]].etag if file["path"] in here else None,
                    }
                    for file in files
                ]
            }
        )

    def lfs_batch(self, repo_id: str) -> None:
        objects = self.json()["objects"]
        if not self.may_write() or self.found(repo_id) is None:
            return
        answers = []
        for wanted in objects:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                upload = {"href": f"{self.hub.url}/upload/{wanted['oid']}"}
                known["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            answers.append(known)
        self.reply({"transfer": "basic", "objects": answers})

    def receive(self, oid: str) -> None:
        if not self.hub.may_upload():
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.hang_up()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.fail(400, "the content is not what its name says")
        self.hub.large_files[oid] = content
        return self.reply({})

    def verify(self) -> None:
        known = self.json()["oid"] in self.hub.large_files
        self.reply({}, 200 if known else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not self.may_write():
            return None
        if self.hub.before_commit is not None:
            before, self.hub.before_commit = self.hub.before_commit, None
            before()
        if (found := self.found(repo_id, revision)) is None:
            return None
        repo, head = found
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, head):
            return self.fail(412, "A commit has happened since. Please refresh and try again.")
        oid = repo.commit(self.hub_files(repo.commits[head], lines[1:]))
        if self.hub.lose_commit_response:
            self.hub.lose_commit_response = False
            return self.hang_up()
        return self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def hub_files(self, files: dict[str, Blob], lines: list[dict[str, Any]]) -> dict[str, Blob]:
        """Files after the operations of a commit."""
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.large_files[value["oid"]], is_lfs=True)
            else:
                del files[value["path"]]
        return files

    def info(self, repo_id: str, revision: str = "main") -> None:
        if (found := self.found(repo_id, revision)) is not None:
            repo, commit = found
            siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
            answer = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "private": repo.private}
            self.reply({**answer, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        if (found := self.found(repo_id, revision)) is None:
            return None
        files = found[0].commits[found[1]]
        inside = {
            path: blob for path, blob in sorted(files.items()) if path.startswith(f"{folder}/" if folder else "")
        }
        if folder and not inside:
            return self.fail(404, f"{folder} does not exist", "EntryNotFound")
        return self.reply(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(blob.content),
                    "oid": blob.oid,
                    **(
                        {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}}
                        if blob.is_lfs
                        else {}
                    ),
                }
                for path, blob in inside.items()
            ]
        )

    def refs(self, repo_id: str) -> None:
        if (found := self.found(repo_id)) is not None:
            kinds = {"branches": ("heads", found[0].branches), "tags": ("tags", found[0].tags)}
            listed = {
                kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in names.items()]
                for kind, (ref, names) in kinds.items()
            }
            self.reply({**listed, "converts": []})

    def tag(self, repo_id: str, revision: str) -> None:
        name = self.json()["tag"]
        if not self.may_write() or (found := self.found(repo_id, revision)) is None:
            return None
        if name in found[0].tags:
            return self.fail(409, f"Tag {name} exists")
        found[0].tags[name] = found[1]
        return self.reply({})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if (found := self.found(repo_id, revision)) is None:
            return None
        repo, commit = found
        about = {"X_Repo_Commit": commit}
        blob = repo.commits[commit].get(path)
        if blob is None:
            return self.fail(404, f"{path} does not exist", "EntryNotFound", **about)
        about["ETag"] = f'"{blob.etag}"'
        if not blob.is_lfs:
            return self.reply(blob.content, **about)
        self.hub.large_files.setdefault(blob.sha256, blob.content)
        linked = {"X_Linked_ETag": f'"{blob.sha256}"', "X_Linked_Size": len(blob.content)}
        # to another host, as the Hub's storage is: a client follows a redirect on the same host before it reads these
        location = f"http://localhost:{self.hub.port}/storage/{blob.sha256}"
        return self.reply(b"", 302, Location=location, **about, **linked)

    def stored(self, oid: str) -> None:
        self.reply(self.hub.large_files[oid], ETag=f'"{oid}"')


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/upload/(?P<oid>\w+)", Handler.receive),
    ("POST", "/verify", Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", Handler.tag),
    ("GET", f"/api/models/{REPO}/refs", Handler.refs),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", Handler.info),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET", r"/storage/(?P<oid>\w+)", Handler.stored),
]


def card_errors(content: str) -> list[str]:
    """What the Hub is known to refuse in a model card's metadata; its own list is longer and not public."""
    head = re.match(r"---\n(.*?)\n---", content, flags=re.DOTALL)
    if head is None:
        return ["there is no metadata block"]
    try:
        data = yaml.safe_load(head.group(1))
    except yaml.YAMLError as error:
        return [f"not valid YAML: {error}"]
    errors = []
    if data.get("license") not in LICENSES:
        errors.append(f'"license" must be one of {", ".join(LICENSES)}')
    errors += [
        f'"language": {code!r} is no ISO 639 code' for code in data["language"] if not re.fullmatch("[a-z]{2,3}", code)
    ]
    for key in ("base_model", "datasets"):
        errors += [f'"{key}": {name!r} is no repository' for name in data.get(key, []) if not is_repo_id(name)]
    errors += [f'"tags": {tag!r} is no text' for tag in data.get("tags", []) if not isinstance(tag, str)]
    if "model-index" in data:
        try:
            _, results = model_index_to_eval_results(data["model-index"])
            numbers = [result.metric_value for result in results]
            errors += [
                f'"model-index": {value!r} is no number' for value in numbers if not isinstance(value, (int, float))
            ]
        except (KeyError, TypeError) as error:
            errors.append(f'"model-index" lacks {error}')
    return errors


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def go_online(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    """This process, which the tests keep offline, may talk to the server; retries do not wait."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
