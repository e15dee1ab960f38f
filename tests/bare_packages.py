"""An environment where this package is not installed, for a process of its own: `python -S` with it as PYTHONPATH."""

import sys
import sysconfig
from pathlib import Path

LEFT_OUT = ("hf_tfamily", "hf-tfamily", "__editable__", "triton")


def link_packages(folder: Path) -> Path:
    """Fill a folder with links to everything that is installed, but for this package and triton."""
    installed = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    for home in installed or [Path(sysconfig.get_path("purelib"))]:
        for entry in home.iterdir():
            if not entry.name.startswith(LEFT_OUT) and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder
