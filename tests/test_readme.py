"""The README's Python runs as it stands, in its order, on a model like the one that its first command trains."""

import re
import shutil
from pathlib import Path

from transformers import AutoConfig

from hf_tfamily.auto import SYSTEMS
from hf_tfamily.recipes import load_recipe
from hf_tfamily.training import train

ROOT = Path(__file__).parents[1]
OURS = "https://raw.githubusercontent.com/hf-tfamily/hf-tfamily/main/"  # where other places show pictures from
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ["model.num_hidden_layers=1", "training.max_steps=2", "training.eval_steps=2", "training.save_steps=2"]
    train(load_recipe("sparse_transformer/digits", smaller))
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "zero.png").exists()
    assert namespace["llama"].config.attention_patterns == {"type": "local", "window": 64}


def test_files_and_systems_it_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.replace(OURS, "")):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    named = set(re.findall(r"\[`(\w+)`\]\(docs/systems/", README))
    assert named == {system.name for system in SYSTEMS}
    assert all(AutoConfig.for_model(name) for name in named)


def test_what_its_tree_names_exists_and_nothing_of_modeling_is_missing():
    tree = re.search(r"## Where things are\n.*?```\n(.*?)```", README, flags=re.DOTALL)[1]
    home, named = None, set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            home = ROOT / re.match(r"\S+", line)[0]
            assert home.exists(), home
        elif not line.startswith("    "):
            for name in re.split(r", *", re.split(r" {3,}", line.strip())[0].strip(", ")):
                found = list(home.glob(name.rstrip("/")))
                assert found, name
                named.update(found)
    wings = [*(ROOT / "modeling").glob("*.py"), *(ROOT / "src/hf_tfamily/block_sparse").glob("*.py")]
    missing = {path.name for path in wings if path not in named} - {"__init__.py"}
    assert not missing, f"README's tree lacks {sorted(missing)}"


def test_it_says_the_commands_that_continuous_integration_runs():
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in README
    assert "hf-tfamily train sparse_transformer/digits\n" in README
    assert shutil.which("hf-tfamily")
