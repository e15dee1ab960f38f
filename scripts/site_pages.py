"""What `mkdocs build` adds to the pages of docs/: the README as the first page, benchmarks/, and the public names.

Links lead where they lead in the repository: to a page of the site where there is one, else to the file at the
repository's address.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s]+)(\))")
ABSOLUTE_HERE = "https://raw.githubusercontent.com/hf-tfamily/hf-tfamily/main/"
# Public names by the module that they are defined in; what fits nothing stands behind them.
GROUPS = {
    "Attention patterns": r"modeling\.attention_patterns$",
    "Caches and memories": r"modeling\.(cache|memory)_\w+$",
    "Configurations": r"modeling\.configuration_\w+$",
    "Models": r"modeling\.modeling_\w+$",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for path in sorted((ROOT / "benchmarks").iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "api.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links that leave docs/ lead on."""
    place = page.file.src_uri
    source = {"index.md": "README.md"}.get(place, place if place.startswith("benchmarks/") else f"docs/{place}")

    def lead_on(link: re.Match) -> str:
        target, hash_sign, anchor = link[2].partition("#")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        return f"{link[1]}{_address(inside, place, config.repo_url, files)}{hash_sign}{anchor}{link[3]}"

    return LINK.sub(lead_on, markdown.replace(ABSOLUTE_HERE, "") if source == "README.md" else markdown)


def _address(inside: str, place: str, repository: str, files: Files) -> str:
    """Of a file of the repository, as seen from a page of the site."""
    uri = {"README.md": "index.md"}.get(inside, inside.removeprefix("docs/"))
    if files.get_file_from_path(uri) is not None and inside.startswith(("docs/", "benchmarks/", "README.md")):
        return posixpath.relpath(uri, posixpath.dirname(place) or ".")
    return f"{repository.rstrip('/')}/blob/main/{inside}"


def reference() -> str:
    """A page of all public names, by kind."""
    import hf_tfamily

    grouped: dict[str, list[str]] = {title: [] for title in (*GROUPS, "Training, data and the Hub")}
    for name in hf_tfamily.__all__:
        if name == "block_sparse":  # a package, which docs/engine.md tells of
            continue
        where = getattr(hf_tfamily, name).__module__
        title = next((title for title, rule in GROUPS.items() if re.search(rule, where)), list(grouped)[-1])
        grouped[title].append(f"{where.removeprefix('hf_tfamily.') if '.modeling.' in where else where}.{name}")
    lines = ["# Reference", "", "All that `from hf_tfamily import ...` gives."]
    for title, names in grouped.items():
        lines += ["", f"## {title}", "", *(f"::: {name}\n" for name in names)]
    return "\n".join(lines)
