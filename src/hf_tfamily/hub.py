"""Folders that load anywhere (weights, configuration, processor, and the model's own code beside them), and the Hub.

The code travels only with `export` and `push`, not with every `save_pretrained`, so a Trainer's checkpoints hold none.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .auto import SYSTEMS
from .card import THIS_FOLDER, folder_card
from .file_permissions import give_usual_permissions
from .modeling.attention import BLOCK_SPARSE

MODELING = f"{__package__}.modeling."
# What a Trainer leaves in a model's folder, none of which a reader of the model needs.
NOT_PUSHED = ("checkpoint-*", "runs/*", "__pycache__/*", ".*", "*/.*", "trainer_state.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")


class PushError(ValueError):
    """A folder that cannot be pushed, or a Hub that does not take it. No file was changed, neither there nor here."""


class Pushed(NamedTuple):
    """What `push` did: where the commit is, the files of the folder that are in it, and those that are not."""

    url: str
    files: list[str]
    left_out: list[str]


def export(model: PreTrainedModel, folder: str | Path, processor: Any = None) -> None:
    """Save `model` and its processor or tokenizer into `folder`, whole: a class of this package with its code, a stock
    model under attention patterns with the backend that follows them.

    The folder loads after `import hf_tfamily`; one of this package's classes also where it is not installed, with
    `trust_remote_code=True`.

    Raises:
        ValueError: for any other model, which `save_pretrained` saves whole, and for one that is sharded.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            f"This {type(model).__name__} is spread over several processes; save what "
            "hf_tfamily.processes.whole_model(trainer) puts together."
        )
    ours = type(model).__module__.startswith(MODELING)
    if not ours and not getattr(model.config, "attention_patterns", None):
        raise ValueError(
            f"{type(model).__name__} is no model of this package and follows no attention patterns; save it with "
            "save_pretrained. Models loaded as remote code save their own."
        )
    model.save_pretrained(folder)
    give_usual_permissions(Path(folder))
    if processor is not None:
        processor.save_pretrained(folder)
    for name, content in (_code(Path(folder)) if ours else _backend(Path(folder))).items():
        (Path(folder) / name).write_bytes(content)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    with_code: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload a saved model as one commit, so that a repository holds all of it or nothing new. The folder is only read.

    Args:
        folder: with config.json and safetensors; a finished run, or what `save_pretrained` wrote. Pickles and a
            Trainer's checkpoints are left out.
        repo_id: "namespace/name"; made if it is not there.
        private: make it a private one.
        with_code: the modeling files travel along, so that it loads with `trust_remote_code=True` anywhere.
        revision: branch to commit to, made from main if it is not there; main if None.
        token: as in huggingface_hub; the one of `hf auth login` or HF_TOKEN if None.

    Raises:
        PushError: if the folder holds no safe model, the name has no namespace, the token is missing or may not write,
            the repository holds another architecture, or somebody else committed meanwhile.
    """
    folder = Path(folder)
    _check_name(repo_id)
    config = _check_folder(folder)
    content, left_out = _content(folder, repo_id, with_code)
    additions = [CommitOperationAdd(path, value) for path, value in sorted(content.items())]
    with _explained(repo_id):
        if token is None and get_token() is None:
            raise PushError("There is no token; log in with `hf auth login`, or set HF_TOKEN.")
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        if private and not head.private:
            raise PushError(f"{repo_id} is there already and public; make it private in its settings, then push.")
        _check_architecture(api, repo_id, head.sha, config["model_type"])
        message = f"Upload {config['architectures'][0]} with hf-tfamily"
        commit = api.create_commit(
            repo_id, additions, commit_message=message, revision=revision, parent_commit=head.sha
        )
    return Pushed(commit.commit_url, [addition.path_in_repo for addition in additions], left_out)


def changed_files(
    folder: str | Path, repo_id: str, with_code: bool = True, revision: str | None = None, token: str | None = None
) -> list[str]:
    """Names of the files that `push` with these arguments would change; all of them if the repository is not there.

    They are compared by the hashes that the Hub lists; nothing is downloaded, and nothing is changed.

    Raises:
        PushError: if the folder holds no safe model, the name has no namespace, or the Hub does not answer.
    """
    folder = Path(folder)
    _check_name(repo_id)
    _check_folder(folder)
    content, _ = _content(folder, repo_id, with_code)
    with _explained(repo_id):
        try:
            listed = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=revision)
            there = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        except (RepositoryNotFoundError, RevisionNotFoundError):
            there = {}
    return sorted(name for name, value in content.items() if not _is_same(value, there.get(name)))


# ---------------------------------------------------------------------------------------------------------------------
# The code beside a model


def _code(folder: Path) -> dict[str, bytes]:
    """The files that make `folder` loadable as remote code: modules, and its JSON files with an `auto_map` in them."""
    config = _read_json(folder / "config.json")
    system = next(system for system in SYSTEMS if system.name == config["model_type"])
    modules = [f"configuration_{system.name}", f"modeling_{system.name}"]
    auto_map = {"AutoConfig": f"{modules[0]}.{system.prefix}Config"}
    auto_map |= {
        auto_class.__name__: f"{modules[1]}.{system.prefix}{suffix}" for auto_class, suffix in system.heads.items()
    }
    files = {"config.json": _to_json({**config, "auto_map": auto_map})}
    processor = system.image_processor
    path = folder / "preprocessor_config.json"
    if processor is not None and path.exists():
        settings = _read_json(path)
        if settings.get("image_processor_type") == processor.__name__ and processor.__module__.startswith(MODELING):
            modules.append(processor.__module__.removeprefix(MODELING))
            auto_map = {"AutoImageProcessor": f"{modules[-1]}.{processor.__name__}"}
            files[path.name] = _to_json({**settings, "auto_map": auto_map})
    return files | _sources(modules)


def _backend(folder: Path) -> dict[str, bytes]:
    """The config of a stock model under patterns that says its backend, which Transformers leaves out; else nothing."""
    config = _read_json(folder / "config.json")
    if _is_ours(config) or not config.get("attention_patterns"):
        return {}
    return {"config.json": _to_json({**config, "attn_implementation": BLOCK_SPARSE})}


def _sources(modules: list[str]) -> dict[str, bytes]:
    """The modules of modeling/ and all that they reach."""
    import hf_tfamily.modeling

    home = Path(hf_tfamily.modeling.__file__).parent
    wanted = [home / f"{module}.py" for module in modules]
    reached = {Path(file) for module in wanted for file in get_relative_import_files(module)}
    return {path.name: path.read_bytes() for path in sorted(reached.union(wanted))}


# ---------------------------------------------------------------------------------------------------------------------
# What is pushed


def _check_name(repo_id: str) -> None:
    namespace, slash, name = repo_id.partition("/")
    if not (slash and namespace and name) or "/" in name:
        raise PushError(
            f"A repository is named namespace/name, such as your-name/{name or namespace}; got {repo_id!r}."
        )


def _check_folder(folder: Path) -> dict:
    """The config of a folder that holds a whole model in safetensors."""
    if not (folder / "config.json").is_file():
        raise PushError(f"{folder} has no config.json; push the folder of a saved model.")
    config = _read_json(folder / "config.json")
    for key in ("model_type", "architectures"):
        if not config.get(key):
            raise PushError(f"{folder / 'config.json'} does not say its {key}; save the model with save_pretrained.")
    index = folder / "model.safetensors.index.json"
    weights = set(_read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if missing := sorted(name for name in weights if not (folder / name).is_file()):
        raise PushError(f"{folder} has no {', '.join(missing)}; weights are pushed as safetensors only, never pickled.")
    return config


def _content(folder: Path, repo_id: str, with_code: bool) -> tuple[dict[str, Path | bytes], list[str]]:
    """What to upload, by its path in the repository, and the names of the pickles that are left out."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path for name, path in found.items() if not _fits(name, NOT_PUSHED)}
    left_out = sorted(name for name in found if _fits(name, PICKLES))
    content = {name: path for name, path in found.items() if name not in left_out}
    if with_code:
        content |= _missing_code(folder)
    else:
        content = {name: path for name, path in content.items() if not name.endswith(".py")}
        content |= _without_auto_map(content)
    content |= _backend(folder)
    return content | _card(folder, repo_id, with_code), left_out


def _missing_code(folder: Path) -> dict[str, bytes]:
    """The code of a folder that was saved without; none for models of other packages."""
    config = _read_json(folder / "config.json")
    if config.get("auto_map") or not _is_ours(config):
        return {}
    return _code(folder)


def _without_auto_map(content: dict[str, Path]) -> dict[str, bytes]:
    """The JSON files that name code, with that taken out."""
    jsons = {name: _read_json(path) for name, path in content.items() if fnmatch(name, "*config.json")}
    return {
        name: _to_json({key: value for key, value in settings.items() if key != "auto_map"})
        for name, settings in jsons.items()
        if "auto_map" in settings
    }


def _card(folder: Path, repo_id: str, with_code: bool) -> dict[str, bytes]:
    """The folder's card, or one of the few facts in its config; it says how to load the repository by name."""
    path = folder / "README.md"
    has_code = with_code and _is_ours(_read_json(folder / "config.json"))
    card = path.read_text(encoding="utf-8") if path.exists() else str(folder_card(folder, has_code))
    return {path.name: card.replace(THIS_FOLDER, repo_id).encode()}


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) or fnmatch(name.partition("/")[0], pattern) for pattern in patterns)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub's answers


def _check_architecture(api: HfApi, repo_id: str, revision: str, model_type: str) -> None:
    """A repository that holds a model of another kind is most likely a slip."""
    try:
        there = _read_json(Path(api.hf_hub_download(repo_id, "config.json", revision=revision))).get("model_type")
    except EntryNotFoundError:
        return
    if there != model_type:
        raise PushError(
            f"{repo_id} holds a model of model_type={there!r}, this one is {model_type!r}; name another repository, "
            "or delete the files there."
        )


def _is_same(value: Path | bytes, there: RepoFile | None) -> bool:
    """Is a file on the Hub this one? A large one is known there by its SHA-256, any other by git's hash."""
    size = value.stat().st_size if isinstance(value, Path) else len(value)
    if there is None or there.size != size:
        return False
    data = value.read_bytes() if isinstance(value, Path) else value
    if there.lfs is not None:
        return hashlib.sha256(data).hexdigest() == there.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % size + data).hexdigest() == there.blob_id


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of huggingface_hub, in one line that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PushError(
            f"Nothing was pushed to {repo_id}: HF_HUB_OFFLINE is set; unset it to reach the Hub."
        ) from error
    except HfHubHTTPError as error:
        raise PushError(f"Nothing was pushed to {repo_id}: {_reason(error)}") from error
    except HTTPError as error:
        raise PushError(f"Nothing was pushed to {repo_id}: the Hub cannot be reached ({error}).") from error
    except RuntimeError as error:  # around the cause, for one of several uploads
        raise PushError(f"Nothing was pushed to {repo_id}: {error} {error.__cause__ or ''}".strip()) from error


def _reason(error: HfHubHTTPError) -> str:
    said = error.response.headers.get("X-Error-Message") or str(error).strip().splitlines()[0]
    return {
        401: f"the Hub does not know the token; log in again with `hf auth login` ({said}).",
        403: f"the token may not write there; it is for reading only, or the account is no member ({said}).",
        404: f"it is not there for this account ({said}).",
        412: f"somebody else committed there meanwhile; look at what changed, then push again ({said}).",
    }.get(error.response.status_code, f"{said} (status {error.response.status_code})")


def _is_ours(config: dict) -> bool:
    return config["model_type"] in {system.name for system in SYSTEMS}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _to_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
