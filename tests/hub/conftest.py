"""A Hub of each test's own, and processes that know nothing but its address."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .fixture_hub import FixtureHub, User

ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def hub():
    with FixtureHub() as hub:
        hub.tokens["write"] = User("someone", writes={"someone", "org"})
        hub.tokens["read"] = User("reader", reads={"org"})
        hub.tokens["stranger"] = User("stranger", writes={"stranger"})
        yield hub


class Client:
    """Runs Python in a process of its own, with a fresh HF_HOME and the unmodified huggingface_hub."""

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

    def run(self, code: str, token: str | None = "write", **environment: str) -> str:
        """What the code prints; it must end well."""
        process = self.start("-c", textwrap.dedent(code), token=token, **environment)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{output}\n{errors}"
        return output


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub, tmp_path)
