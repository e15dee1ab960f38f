"""A Hub of each test's own, and processes that know nothing but its address."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import constants

from .fixture_hub import FixtureHub, User

ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


ROOT = Path(__file__).parents[2]


def open_hub() -> FixtureHub:
    """A Hub that knows an owner of org/, somebody who may read there, and a stranger, each by the token named so."""
    hub = FixtureHub()
    hub.tokens["write"] = User("someone", writes={"someone", "org"})
    hub.tokens["read"] = User("reader", reads={"org"})
    hub.tokens["stranger"] = User("stranger", writes={"stranger"})
    return hub


@pytest.fixture
def hub():
    with open_hub() as hub:
        yield hub


@pytest.fixture
def at_the_fixture(hub, monkeypatch, tmp_path):
    """What HF_ENDPOINT, HF_TOKEN and HF_HOME would say to a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "write")


class Client:
    """Runs Python in processes of their own, each with a fresh HF_HOME and the unmodified huggingface_hub."""

    def __init__(self, hub: FixtureHub, folder: Path):
        self.hub = hub
        self.folder = folder
        self.started = 0

    def start(self, *arguments: str, token: str | None = "write", **environment: str) -> subprocess.Popen:
        self.started += 1
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / f"home-{self.started}")}
        if token is not None:
            ours["HF_TOKEN"] = token
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**clean, **ENVIRONMENT, **ours, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, *arguments: str, options: tuple[str, ...] = (), **environment: str | None) -> str:
        """What the code prints; it must end well."""
        process = self.start(*options, "-c", textwrap.dedent(code), *arguments, **environment)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, f"{output}\n{errors}"
        return output

    def ask(self, code: str, question, **options) -> dict:
        """What the code prints as JSON in its last line, having been given JSON."""
        return json.loads(self.run(code, json.dumps(question), **options).splitlines()[-1])


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub, tmp_path)
