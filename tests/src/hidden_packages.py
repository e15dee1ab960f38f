"""`python -m tests.src.hidden_packages PACKAGE FOLDER`: every command as if PACKAGE were not installed, as JSON.

FOLDER holds micro.yaml, a finished run of it, and a decoder of bytes with a store of micro.yaml. Printed is, for every
command, its exit code and what it said.
"""

import importlib.abc
import importlib.metadata
import importlib.util
import json
import sys
import traceback
from pathlib import Path

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


class Hidden(importlib.abc.MetaPathFinder):
    """Finds everything but one package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide(package):
    """The package is not there, neither for `import` nor for those who ask about it first."""
    sys.meta_path.insert(0, Hidden(package))
    for module, question, none in ((importlib.util, "find_spec", None), (importlib.metadata, "version", Exception)):
        ask = getattr(module, question)

        def answer(name, *args, ask=ask, none=none):
            if name.partition(".")[0].lower() not in (package.lower(), DISTRIBUTIONS.get(package)):
                return ask(name, *args)
            if none is Exception:
                raise importlib.metadata.PackageNotFoundError(name)

        setattr(module, question, answer)


def main(package, folder):
    hide(package)
    from typer.testing import CliRunner

    from hf_tfamily_cli import app

    recipe, finished, new = folder / "micro.yaml", folder / "finished", folder / f"without-{package}"
    commands = {
        "recipes": ["recipes"],
        "show": ["show", recipe],
        "picture": ["show", recipe, "--output", folder / f"{package}.png"],
        "info": ["info"],
        "train": ["train", recipe, "--output", new, "--set", "training.max_steps=1"],
        "evaluate": ["evaluate", finished],
        "sample": ["sample", finished, "--count", "1", "--output", folder / f"{package}-samples.png"],
        "convert": ["convert", folder / "decoder", folder / f"{package}-converted", "--to", "llama"],
        "knn_build": ["knn", "build", folder / "decoder", "--text", recipe, "--output", folder / f"{package}-store"],
        "knn_evaluate": ["knn", "evaluate", folder / "decoder", "--store", folder / "store", "--text", recipe],
        "consolidate": ["consolidate", finished, folder / f"{package}-whole"],
        "push": ["push", finished, "nobody/nothing"],
    }
    said = {}
    for name, command in commands.items():
        result = CliRunner().invoke(app, [str(word) for word in command])
        said[name] = [result.exit_code, result.output]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            said[name] = [-1, "".join(traceback.format_exception(result.exception))]
    try:
        import hf_tfamily

        hf_tfamily.register_peft_defaults()
        said["peft_defaults"] = [0, ""]
    except ImportError as error:
        said["peft_defaults"] = [2, str(error)]
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
