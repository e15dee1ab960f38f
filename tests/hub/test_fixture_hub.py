"""The fixture itself: the unmodified client's calls in one process, each answered as the Hub answers it."""

import hashlib
from http import HTTPStatus

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .fixture_hub import Answer, Blob, Refusal

REPO = "org/name"


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="write")


def add(path, content):
    return CommitOperationAdd(path, content)


def commit(api, *operations, **options):
    return api.create_commit(REPO, operations, commit_message="a message", **options)


@pytest.fixture
def download(hub, tmp_path):
    def read(path, revision=None, token="write"):
        cache = tmp_path / "cache"
        file = hf_hub_download(REPO, path, revision=revision, token=token, endpoint=hub.url, cache_dir=cache)
        with open(file, "rb") as stream:
            return stream.read()

    return read


@pytest.mark.parametrize(("lfs", "part_size"), [((), None), ((".safetensors",), None), ((".safetensors",), 1000)])
def test_files_come_back(hub, api, download, lfs, part_size):
    hub.lfs, hub.part_size = lfs, part_size
    weights = bytes(range(256)) * 10
    api.create_repo(REPO)
    commit(api, add("model.safetensors", weights), add("folder/config.json", b"{}"))
    assert download("model.safetensors") == weights
    assert download("folder/config.json") == b"{}"
    assert hub.repositories[REPO].files["model.safetensors"].is_lfs == bool(lfs)
    assert api.list_repo_files(REPO) == ["folder/config.json", "model.safetensors"]
    sizes = {entry.path: entry.size for entry in api.list_repo_tree(REPO)}
    assert sizes["model.safetensors"] == len(weights)
    uploads = [path for method, path in hub.requests if method == "PUT"]
    assert len(uploads) == (0 if not lfs else 1 if part_size is None else 3)


def test_what_is_there_is_not_sent_again(hub, api):
    hub.lfs = (".safetensors",)
    api.create_repo(REPO)
    commit(api, add("model.safetensors", b"weights"))
    head = hub.repositories[REPO].branches["main"]
    commit(api, add("model.safetensors", b"weights"))
    assert hub.repositories[REPO].branches["main"] == head
    commit(api, add("other.safetensors", b"weights"))
    assert sum(method == "PUT" for method, _ in hub.requests) == 1


def test_branches_tags_and_pull_requests(hub, api, download):
    api.create_repo(REPO)
    first = commit(api, add("file", b"1")).oid
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="other")
    commit(api, add("file", b"2"))
    commit(api, add("file", b"3"), revision="other")
    proposed = commit(api, add("file", b"4"), create_pr=True)
    revisions = {"v1": b"1", "main": b"2", "other": b"3", first: b"1", "refs/pr/1": b"4"}
    assert {revision: download("file", revision) for revision in revisions} == revisions
    assert proposed.pr_url.endswith("/1")
    refs = api.list_repo_refs(REPO)
    assert {ref.name for ref in refs.tags} == {"v1"}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")


def test_deleting(hub, api):
    api.create_repo(REPO)
    commit(api, *(add(path, b"x") for path in ("a", "b/c", "b/d", "bc")))
    commit(api, CommitOperationDelete("a"), CommitOperationDelete("b/"))
    assert hub.repositories[REPO].files == {"bc": Blob(b"x")}


def test_refusals_are_the_clients_own_errors(hub, api, download):
    api.create_repo(REPO)
    commit(api, add("file", b"1"))
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    with pytest.raises(EntryNotFoundError):
        download("nothing")
    with pytest.raises(RevisionNotFoundError):
        download("file", revision="nowhere")
    for token in (False, "stranger"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/missing", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("no such token")
    for token in ("read", "stranger"):
        reading = HfApi(endpoint=hub.url, token=token)
        with pytest.raises(HfHubHTTPError, match="403"):
            commit(reading, add("file", b"2"))
        with pytest.raises(HfHubHTTPError, match="403"):
            reading.create_repo("org/another")


def test_private_and_gated(hub, api, download, tmp_path):
    api.create_repo(REPO, private=True)
    commit(api, add("file", b"1"))
    repository = hub.repositories[REPO]
    assert download("file", token="read") == b"1"
    for token in (False, "stranger"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(REPO, token=token)
    repository.private, repository.gated = False, True
    for token in (False, "stranger"):
        assert api.model_info(REPO, token=token).gated == "auto"
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "file", token=token, endpoint=hub.url, cache_dir=tmp_path / f"empty-{token}")
    repository.readers.add("stranger")
    assert download("file", token="stranger") == b"1"


def test_stale_parent(hub, api):
    api.create_repo(REPO)
    stale = commit(api, add("file", b"1")).oid
    commit(api, add("file", b"2"))
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("file", b"3"), parent_commit=stale)
    assert hub.repositories[REPO].files["file"].data == b"2"


def test_damaged_uploads_are_refused(hub):
    oid = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(Refusal, match="is not"):
        hub._keep(oid, b"wrong")


def test_faults_happen_once(hub, api):
    api.create_repo(REPO)
    hub.once("POST", "/commit/", lambda: Answer(HTTPStatus.SERVICE_UNAVAILABLE))
    with pytest.raises(HfHubHTTPError, match="503"):
        commit(api, add("file", b"1"))
    commit(api, add("file", b"1"))
    assert set(hub.repositories[REPO].files) == {"file"}
