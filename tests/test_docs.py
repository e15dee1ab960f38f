"""The pages of docs/: their Python runs, their links lead somewhere, and what they name exists."""

import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from hf_tfamily.auto import SYSTEMS
from hf_tfamily.modeling.attention_patterns import PATTERN_TYPES
from hf_tfamily.recipes import list_recipes
from tests.hub.conftest import open_hub

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
NEEDS = {"tools.md": "peft", "knn_lm.md": "faiss"}
MARK = "<!-- What follows is made by scripts/make_docs.py -->"
each_page = pytest.mark.parametrize("page", PAGES)
each_system = pytest.mark.parametrize("name", [system.name for system in SYSTEMS])


def read(page):
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback in place of the real one."""
    with open_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "write")
        yield hub


@each_page
def test_snippets_run(page, hub, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    types = dict(PATTERN_TYPES)
    namespace = {"__name__": "snippet"}
    try:
        for block in re.findall(r"```python\n(.*?)```", read(page), flags=re.DOTALL):
            exec(compile(block, page, "exec"), namespace)
    finally:
        for name in PATTERN_TYPES.keys() - types:
            del PATTERN_TYPES[name]


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", read(page)):
        assert target.startswith("https://") or ((DOCS / page).parent / target).exists(), target


@each_system
def test_every_system_has_a_page_that_is_not_stale(name):
    made = read(f"systems/{name}.md").partition(MARK)[2]
    assert set(re.findall(rf"`({name}/[\w-]+)`", made)) <= set(list_recipes())
    config = AutoConfig.for_model(name)
    table = made.partition("## Fields of")[2].partition("\n## ")[0]
    named = {
        field
        for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for field in re.findall(r"`(\w+)`", row)
    }
    assert named
    assert not [field for field in named if not hasattr(config, field)]
