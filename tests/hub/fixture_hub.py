"""A Hub on loopback, for tests: what huggingface_hub asks of a real one when it pushes and pulls models.

    with FixtureHub() as hub:
        hub.tokens["secret"] = User("someone", writes={"someone", "org"})
        HfApi(endpoint=hub.url, token="secret").create_repo("org/name")

Repositories are real histories: a commit names its parent and holds every file of its state. Files travel inside the
commit (regular) or, with `hub.lfs` set, beside it by the LFS protocol, whole or in parts, held to their SHA-256; such
a file is downloaded through a redirect. The client needs HF_HUB_DISABLE_XET=1 for the latter, and nothing else.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class User(NamedTuple):
    """Who a token belongs to, the namespaces it may write to, and those it may read private repositories of."""

    name: str
    writes: frozenset[str] | set[str] = frozenset()
    reads: frozenset[str] | set[str] = frozenset()


class Blob(NamedTuple):
    """One file's content; an LFS file is known by its SHA-256, a regular one by git's hash."""

    data: bytes
    is_lfs: bool = False

    @property
    def git_oid(self) -> str:
        content = _lfs_pointer(self.data) if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else self.git_oid


class Commit(NamedTuple):
    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Branches and tags are names of commits. `gated`: all may see that it exists, only `readers` its files."""

    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self.add_commit(None, "initial commit", {}).oid

    @property
    def namespace(self) -> str:
        return self.name.partition("/")[0]

    @property
    def files(self) -> dict[str, Blob]:
        """What is at the head of main."""
        return self.commit_at("main").files

    def commit_at(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def add_commit(self, parent: str | None, message: str, files: dict[str, Blob]) -> Commit:
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([parent, message, tree]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, files)
        return self.commits[oid]


class Refusal(Exception):
    """An answer that is an error, with the headers that huggingface_hub turns into its own exceptions."""

    def __init__(self, status: HTTPStatus, code: str | None, message: str, **headers: str):
        super().__init__(message)
        coded = {"X-Error-Code": code} if code else {}
        self.answer = Answer(status, {"error": message}, {**coded, "X-Error-Message": message, **headers})


class Dropped(Exception):
    """Raised by a fault: close the connection without an answer."""


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Answer(NamedTuple):
    status: HTTPStatus = HTTPStatus.OK
    content: Any = b""  # bytes, or what becomes JSON
    headers: dict[str, str] = {}


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, pattern: str) -> Callable:
    """Let a method of FixtureHub answer requests for a path; {repo} and {revision} are groups, {path} takes slashes."""
    groups = {"repo": "[^/]+/[^/]+", "revision": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}", "part": "[0-9]+"}
    expression = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{groups[match[1]]})", pattern)

    def remember(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(expression), function))
        return function

    return remember


class FixtureHub:
    """The server and all it knows.

    Attributes:
        tokens: users by token.
        repositories: by name, such as "org/name".
        requests: (method, path) of everything asked so far.
        lfs: names of files that are to travel by LFS, as the end of their name.
        part_size: upload LFS files in parts of so many bytes; whole if None.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, User] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.lfs: tuple[str, ...] = ()
        self.part_size: int | None = None
        self._large_files: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._faults: list[tuple[str, re.Pattern, Callable[[], Answer | None]]] = []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage_url = f"http://localhost:{port}"  # another host, to which the client sends no token

    def __enter__(self) -> "FixtureHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def once(self, method: str, pattern: str, fault: Callable[[], Answer | None]) -> None:
        """Call `fault` at the next request that fits; its answer, if it gives one, goes out instead of ours."""
        self._faults.append((method, re.compile(pattern), fault))

    def answer(self, request: Request) -> Answer:
        self.requests.append((request.method, request.path))
        for place, (method, pattern, fault) in enumerate(self._faults):
            if method == request.method and pattern.search(request.path):
                del self._faults[place]
                if (answer := fault()) is not None:
                    return answer
                break
        methods = {"HEAD", "GET"} if request.method == "HEAD" else {request.method}
        for method, pattern, function in ROUTES:
            if method in methods and (match := pattern.fullmatch(request.path)):
                groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                with self._lock:
                    return function(self, request, **groups)
        raise Refusal(HTTPStatus.NOT_FOUND, None, f"This Hub has no {request.method} {request.path}")

    # -----------------------------------------------------------------------------------------------------------------
    # Who may do what

    def _user(self, request: Request) -> User | None:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(HTTPStatus.UNAUTHORIZED, None, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _readable(self, request: Request, repo: str) -> Repository:
        """A private repository and none look alike to those who may not read it."""
        user, repository = self._user(request), self.repositories.get(repo)
        if repository is None or (repository.private and not _may_read(user, repository)):
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.NOT_FOUND
            raise Refusal(status, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, request: Request, repo: str) -> Repository:
        user, repository = self._user(request), self._readable(request, repo)
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, None, "Invalid username or password.")
        if repository.namespace not in user.writes:
            raise Refusal(HTTPStatus.FORBIDDEN, None, f"You don't have the rights to write to {repo}")
        return repository

    # -----------------------------------------------------------------------------------------------------------------
    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        user = self._user(request)
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, None, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"role": "write" if user.writes else "read"}}
        return Answer(content={"type": "user", "name": user.name, "orgs": [], "auth": access})

    @route("POST", "/api/repos/create")
    def create(self, request: Request) -> Answer:
        user, wanted = self._user(request), request.json
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, None, "Invalid username or password.")
        namespace = wanted.get("organization") or user.name
        repo = f"{namespace}/{wanted['name']}"
        if namespace not in user.writes:
            message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            raise Refusal(HTTPStatus.FORBIDDEN, None, message)
        answer = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            return Answer(HTTPStatus.CONFLICT, {**answer, "error": "You already created this model repo"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repositories[repo] = Repository(repo, private=bool(private))
        return Answer(content=answer)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        return Answer(content={"errors": [], "warnings": []})

    @route("GET", "/api/models/{repo}(/revision/{revision})?")
    def model_info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        repository = self._readable(request, repo)
        commit = repository.commit_at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        flags = {"private": repository.private, "gated": repository.gated and "auto", "disabled": False}
        return Answer(
            content={"id": repo, "modelId": repo, "sha": commit.oid, "siblings": siblings, "tags": [], **flags}
        )

    @route("GET", "/api/models/{repo}/tree/{revision}(/{path})?")
    def tree(self, request: Request, repo: str, revision: str, path: str = "") -> Answer:
        files = self._readable(request, repo).commit_at(revision).files
        return Answer(content=[_entry(name, blob) for name, blob in sorted(files.items()) if name.startswith(path)])

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, request: Request, repo: str) -> Answer:
        repository = self._readable(request, repo)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        named = {
            kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for kind, (folder, refs) in kinds.items()
        }
        return Answer(content={**named, "converts": []})

    @route("POST", "/api/models/{repo}/(?P<kind>branch|tag)/{revision}")
    def name_commit(self, request: Request, repo: str, kind: str, revision: str) -> Answer:
        """A new branch is in the path and starts at a commit; a new tag is in the body, and the path says where."""
        repository, wanted = self._writable(request, repo), request.json
        start = wanted.get("startingPoint", "main") if kind == "branch" else revision
        name, names = (revision, repository.branches) if kind == "branch" else (wanted["tag"], repository.tags)
        if name in names:
            raise Refusal(HTTPStatus.CONFLICT, None, f"Reference already exists: {name}")
        names[name] = repository.commit_at(start).oid
        return Answer(content={})

    # -----------------------------------------------------------------------------------------------------------------
    # Upload

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, request: Request, repo: str, revision: str) -> Answer:
        files = self._writable(request, repo).commit_at(revision).files
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(self.lfs) and self.lfs else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].etag if file["path"] in files else None,
            }
            for file in request.json["files"]
        ]
        return Answer(content={"files": modes})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo: str) -> Answer:
        self._writable(request, repo)
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"], **self._upload_actions(wanted["oid"], wanted["size"])}
            for wanted in request.json["objects"]
        ]
        return Answer(content={"transfer": "multipart" if self.part_size else "basic", "objects": objects})

    def _upload_actions(self, oid: str, size: int) -> dict:
        """Where to send a file; nothing if it is here already."""
        if oid in self._large_files:
            return {}
        verify = {"href": f"{self.url}/lfs/{oid}/verify"}
        if self.part_size is None:
            return {"actions": {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": verify}}
        parts = range(1, -(-size // self.part_size) + 1)
        header = {str(part): f"{self.url}/lfs/{oid}/part/{part}" for part in parts}
        upload = {"href": f"{self.url}/lfs/{oid}/complete", "header": {"chunk_size": str(self.part_size), **header}}
        return {"actions": {"upload": upload, "verify": verify}}

    @route("PUT", "/lfs/{oid}")
    def put(self, request: Request, oid: str) -> Answer:
        return self._keep(oid, request.body)

    @route("PUT", "/lfs/{oid}/part/{part}")
    def put_part(self, request: Request, oid: str, part: str) -> Answer:
        self._parts.setdefault(oid, {})[int(part)] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("POST", "/lfs/{oid}/complete")
    def complete(self, request: Request, oid: str) -> Answer:
        parts = self._parts.pop(oid)
        return self._keep(oid, b"".join(parts[part["partNumber"]] for part in request.json["parts"]))

    def _keep(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(HTTPStatus.BAD_REQUEST, None, f"What was sent is not {oid}")
        self._large_files[oid] = content
        return Answer(content={})

    @route("POST", "/lfs/{oid}/verify")
    def verify(self, request: Request, oid: str) -> Answer:
        known = self._large_files.get(oid)
        if known is None or len(known) != request.json["size"]:
            raise Refusal(HTTPStatus.NOT_FOUND, None, f"No such file: {oid}")
        return Answer(content={})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, request: Request, repo: str, revision: str) -> Answer:
        repository = self._writable(request, repo)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        head = repository.commit_at(revision)
        expected = header["value"].get("parentCommit")
        if expected is not None and not head.oid.startswith(expected):
            message = "A commit has happened since. Please refresh and try again."
            raise Refusal(HTTPStatus.PRECONDITION_FAILED, None, message)
        files = dict(head.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        made = repository.add_commit(head.oid, header["value"]["summary"], files)
        pull_request = {}
        if request.query.get("create_pr") == ["1"]:
            revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.branches)}"
            pull_request = {"pullRequestUrl": f"{self.url}/{repo}/discussions/{revision.rpartition('/')[2]}"}
        repository.branches[revision] = made.oid
        return Answer(
            content={"commitUrl": f"{self.url}/{repo}/commit/{made.oid}", "commitOid": made.oid, **pull_request}
        )

    def _apply(self, kind: str, value: dict, files: dict[str, Blob]) -> None:
        """One line of a commit."""
        path = value["path"]
        if kind == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in self._large_files:
                raise Refusal(HTTPStatus.BAD_REQUEST, None, f"{path} was not uploaded")
            files[path] = Blob(self._large_files[value["oid"]], is_lfs=True)
        elif kind in ("deletedFile", "deletedFolder"):
            for name in [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        else:
            raise Refusal(HTTPStatus.BAD_REQUEST, None, f"Unknown operation {kind}")

    # -----------------------------------------------------------------------------------------------------------------
    # Download

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        repository = self._readable(request, repo)
        if repository.gated and not _may_read(self._user(request), repository):
            status = HTTPStatus.UNAUTHORIZED if self._user(request) is None else HTTPStatus.FORBIDDEN
            raise Refusal(status, "GatedRepo", f"Access to model {repo} is restricted.")
        commit = repository.commit_at(revision)
        sha = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", f"Entry not found: {path}", **sha)
        blob = commit.files[path]
        if not blob.is_lfs:
            return _content(request, blob.data, {**sha, "ETag": f'"{blob.etag}"'})
        linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        place = {"Location": f"{self.storage_url}/storage/{blob.etag}"}
        return Answer(HTTPStatus.FOUND, headers={**sha, **linked, **place})

    @route("GET", "/storage/{oid}")
    def storage(self, request: Request, oid: str) -> Answer:
        if request.headers.get("Authorization"):
            raise Refusal(HTTPStatus.BAD_REQUEST, None, "The token was sent to another host")
        return _content(request, self._large_files[oid], {"ETag": f'"{oid}"'})


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 around FixtureHub.answer."""

    hub: FixtureHub
    protocol_version = "HTTP/1.1"

    def serve(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, self._body())
        try:
            answer = self.hub.answer(request)
        except Refusal as refusal:
            answer = refusal.answer
        except Dropped:
            self.close_connection = True
            return
        except Exception as error:  # a mistake of this file's; 5xx would be tried again for half a minute
            answer = Refusal(HTTPStatus.BAD_REQUEST, None, f"fixture_hub: {type(error).__name__} {error}").answer
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer) -> None:
        content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal; `FixtureHub.requests` has it."""


def _may_read(user: User | None, repository: Repository) -> bool:
    return user is not None and (
        repository.namespace in user.writes or repository.namespace in user.reads or user.name in repository.readers
    )


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """The bytes asked for: all, or those from `Range: bytes=N-` on, as a resumed download wants."""
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
    if match is None:
        return Answer(content=data, headers=headers)
    start = int(match[1])
    where = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
    return Answer(HTTPStatus.PARTIAL_CONTENT, data[start:], {**headers, **where})


def _entry(path: str, blob: Blob) -> dict:
    lfs = {"lfs": {"oid": blob.etag, "size": len(blob.data), "pointerSize": 134}} if blob.is_lfs else {}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid, **lfs}


def _lfs_pointer(data: bytes) -> bytes:
    oid = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
