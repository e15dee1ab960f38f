"""What type checkers see of the package, as a wheel installs it (an editable install is found by Python alone)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("src", "modeling", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


def test_right_uses_pass_and_wrong_ones_are_found(tmp_path):
    copy = tmp_path / "copy"  # in which the build leaves its own files
    copy.mkdir()
    for name in BUILT_FROM:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, copy / name)
    build = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *build, str(copy)], check=True)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *cache],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
