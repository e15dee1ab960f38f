"""Write the parts of docs/systems/*.md and of docs/claims.md that follow from the code, and draw the pictures there.

    python scripts/make_docs.py

Each page is written by hand above the line MARK; below it stand the places of the paper that the code names, the fields
of the config, and the recipes.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from hf_tfamily import plots
from hf_tfamily.auto import SYSTEMS
from hf_tfamily.modeling.attention_patterns import Window2D, pattern_from_dict
from hf_tfamily.pattern_views import parse_pattern, pattern_panels
from hf_tfamily.recipes import list_recipes, load_recipe
from hf_tfamily.reproduction import list_claims, load_claim
from hf_tfamily.reproduction.page import index

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "systems"
FOLDER = ROOT / "docs" / "pictures"
MARK = "<!-- What follows is made by scripts/make_docs.py -->"
PLACE = re.compile(r"\b(?:equations?|sections?|algorithms?|figures?) \d[\d.]*(?:(?:, | and | to )\d[\d.]*)*")
# Shared files of modeling/ that carry out what a system's paper says.
ALSO_READ = {"image_transformer": ("image_processing_tokens",)}
# Patterns that a system is about, in the short form of `hf-tfamily show`.
PICTURES = {
    "sparse_transformer": ("local:window=8", "strided:stride=8", "fixed:block=8,summary=2"),
    "xl_sparse": ("local:window=6+strided:stride=6",),
    "rope_decoder": ("full", "local:window=8"),
    "image_transformer": ("block_1d:block=6,flange=6", "block_2d:height=3,width=3,flange_height=1,flange_width=2"),
}


def make_page(name: str, prefix: str) -> None:
    """Replace what stands below the mark of one page."""
    page = DOCS / f"{name}.md"
    written = page.read_text(encoding="utf-8").partition(MARK)[0]
    parts = [_paper(name), _fields(name, prefix), _recipes(name)]
    page.write_text(f"{written}{MARK}\n\n" + "\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _paper(name: str) -> str:
    """A table of the places of the paper that the modeling file, and shared files beside it, name."""
    files = [ROOT / "modeling" / f"{stem}.py" for stem in (f"modeling_{name}", *ALSO_READ.get(name, ()))]
    links = [f"[modeling/{path.name}](../../modeling/{path.name})" for path in files]
    rows = [f"| {place} | `{where}` | {text} |" for path in files for place, where, text in _mentions(path)]
    if not rows:
        return ""
    return "\n".join(
        [
            "## From the paper to the code",
            "",
            f"All in {', '.join(links)}.",
            "",
            "| paper | code | |",
            "|---|---|---|",
            *rows,
        ]
    )


def _mentions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place in the paper, class and function, what is said there) for comments and docstrings, in order."""
    source = path.read_text(encoding="utf-8")
    scopes = list(_scopes(ast.parse(source)))
    said = [
        (scope.body[0].lineno, ast.get_docstring(scope).split("\n\n")[0])
        for _, scope in scopes
        if _has_docstring(scope)
    ]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said.append((token.start[0], token.string.lstrip("# ")))
    for line, text in sorted(said):
        where = [name for name, scope in scopes if scope.lineno <= line <= scope.end_lineno]
        places = dict.fromkeys(PLACE.findall(text))
        if places and where:
            yield ", ".join(places), where[-1], " ".join(text.split()).replace("|", "\\|")


def _scopes(tree: ast.AST, outside: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield outside + node.name, node
            yield from _scopes(node, f"{outside}{node.name}.")


def _has_docstring(scope: ast.AST) -> bool:
    return ast.get_docstring(scope) is not None


def _fields(name: str, prefix: str) -> str:
    """The `Args:` of the config's docstring as a table."""
    module = import_module(f"hf_tfamily.modeling.configuration_{name}")
    text = ast.get_docstring(ast.parse(f"class X:\n    '''{getattr(module, prefix + 'Config').__doc__}'''").body[0])
    rows, inside = [], text.partition("Args:\n")[2]
    for entry in re.split(r"\n(?=    \w)", inside):
        names, colon, meaning = entry.strip().partition(":")
        if colon and re.fullmatch(r"[\w, ]+", names):
            quoted = ", ".join(f"`{field.strip()}`" for field in names.split(","))
            rows.append(f"| {quoted} | {' '.join(meaning.split()).replace('|', chr(92) + '|')} |")
    if not rows:
        return ""
    parent = getattr(module, prefix + "Config").__mro__[1]
    own = parent.__module__.startswith("hf_tfamily.") and parent.__name__.removesuffix("Config")
    system = next((system.name for system in SYSTEMS if system.prefix == own), None)
    further = [f"And those of [`{parent.__name__}`]({system}.md).", ""] if system else []
    return "\n".join([f"## Fields of `{prefix}Config`", "", *further, "| field | meaning |", "|---|---|", *rows])


def _recipes(name: str) -> str:
    """The recipes of a system, with the command that trains one."""
    recipes = [load_recipe(recipe) for recipe in list_recipes() if recipe.startswith(f"{name}/")]
    if not recipes:
        return ""
    rows = [f"| `{r.name}` | {r.parameters or 0:,} | {r.title} | {r.reference} |" for r in recipes]
    heading = [
        "## Recipes",
        "",
        "`hf-tfamily train RECIPE` trains one; the card of the finished folder has its figures. "
        "[What the small ones reach here](../results.md).",
        "",
    ]
    return "\n".join([*heading, "| recipe | parameters | what it is | reference |", "|---|---|---|---|", *rows])


def make_claims() -> None:
    """Replace what stands below the mark of docs/claims.md by the table of all claims."""
    page = DOCS.parent / "claims.md"
    written = page.read_text(encoding="utf-8").partition(MARK)[0]
    claims = []
    for name in list_claims():
        file = page.with_suffix("") / f"{name}.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        claims.append((name, load_claim(name), record))
    page.write_text(f"{written}{MARK}\n\n{index(claims, page.stem)}\n", encoding="utf-8")


def draw(name: str) -> None:
    """The picture at the head of a page."""
    file = FOLDER / f"{name}.png"
    panels = [panel for text in PICTURES[name] for panel in pattern_panels(parse_pattern(text))]
    plots.pattern_pictures(panels, file)


@plots.styled
def draw_windows(file: Path) -> None:
    """Windows of 4 x 4 on a grid of 12 x 12, and the same moved by 2; a token sees those of its own colour."""
    figure = plots.new_figure(5.2, 2.8)
    for axes, shift in zip(figure.subplots(1, 2), (0, 2)):
        pattern = Window2D(4, shift).bind((12, 12))
        numbers = np.array([pattern.window(token) for token in range(144)]).reshape(12, 12)
        order = {number: place for place, number in enumerate(dict.fromkeys(numbers.flat))}
        axes.imshow(np.vectorize(order.get)(numbers) * 7 % 16, cmap="tab20c")
        axes.set_title(f"windows of 4, moved by {shift}", **plots.PANEL_TITLE)
        axes.set_axis_off()
    plots.save(figure, file)


@plots.styled
def draw_memory(file: Path, segment: int = 4, memory: int = 4, places: int = 0, rate: int = 2) -> None:
    """Which tokens a segment sees, a row for each: itself, the memory, and compressed places."""
    figure = plots.new_figure(6.0, 2.6)
    axes = figure.subplots()
    kinds = {"segment": plots.BLUE, "memory": "#9dc3ea"}
    if places:
        kinds[f"{rate} tokens in 1 place"] = plots.ORANGE
    for row in range(6):
        start = row * segment
        reach = max(0, start - memory)
        spans = [(first, rate, plots.ORANGE) for first in range(max(0, reach - places * rate), reach, rate)]
        spans += [(first, 1, kinds["memory"]) for first in range(reach, start)]
        spans += [(first, 1, kinds["segment"]) for first in range(start, start + segment)]
        for first, width, colour in spans:
            axes.barh(row, width - 0.12, left=first + 0.06, height=0.7, color=colour)
    axes.set(xlabel="token", ylabel="segment", yticks=range(6), xlim=(0, 6 * segment))
    axes.invert_yaxis()
    for label, colour in kinds.items():
        axes.barh(0, 0, color=colour, label=label)
    axes.legend(loc="upper right", fontsize=8)
    plots.save(figure, file)


@plots.styled
def draw_store(file: Path, segment: int = 4, memory: int = 4, stored: int = 12) -> None:
    """Which tokens the last query of each segment sees in the memory layer, a row for each."""
    figure = plots.new_figure(6.0, 2.6)
    axes = figure.subplots()
    draws = np.random.default_rng(3)
    for row in range(6):
        start = row * segment
        left = max(0, start - memory)
        store = range(max(0, left - stored), left)
        chosen = draws.choice(store, size=min(3, len(store)), replace=False) if len(store) else ()
        spans = [(token, plots.ORANGE if token in chosen else "#f7dfc8") for token in store]
        spans += [(token, "#9dc3ea") for token in range(left, start)]
        spans += [(token, plots.BLUE) for token in range(start, start + segment)]
        for token, colour in spans:
            axes.barh(row, 0.88, left=token + 0.06, height=0.7, color=colour)
    axes.set(xlabel="token", ylabel="segment", yticks=range(6), xlim=(0, 6 * segment))
    axes.invert_yaxis()
    kinds = {"segment": plots.BLUE, "short memory": "#9dc3ea", "store": "#f7dfc8", "looked up": plots.ORANGE}
    for label, colour in kinds.items():
        axes.barh(0, 0, color=colour, label=label)
    axes.legend(loc="upper right", fontsize=8)
    plots.save(figure, file)


@plots.styled
def draw_masks(file: Path, masks: dict[str, np.ndarray]) -> None:
    """What queries see (down) of keys (right), by title."""
    figure = plots.new_figure(2.4 * len(masks), 2.7)
    for axes, (title, mask) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items()):
        axes.imshow(mask, cmap=ListedColormap(["#e8ecf0", "#2f6fb7"]), vmin=0, vmax=1)
        axes.set_title(title, **plots.PANEL_TITLE)
        axes.set(xticks=np.arange(0.5, mask.shape[1] - 1), yticks=np.arange(0.5, len(mask) - 1))
        axes.set(xlabel="key", ylabel="query")
        axes.grid(color="white", linewidth=1)
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
    plots.save(figure, file)


def masks_of_encoder(length: int = 8, window: int = 2, padding: int = 2) -> dict[str, np.ndarray]:
    """All tokens, a window, and what is left where the row is padded."""
    places = np.arange(length)
    near = abs(places[:, None] - places) <= window
    return {
        "every token": np.ones((length, length)),
        f"local, window={2 * window + 1}": near,
        f"padded by {padding}": np.tile(places < length - padding, (length, 1)),
    }


@plots.styled
def draw_steps(file: Path, taken: Sequence[int] = (2, 4, 1, 5, 3, 2, 4)) -> None:
    """Which steps positions are computed in (filled), and which they are copied through."""
    figure = plots.new_figure(4.2, 2.8)
    axes = figure.subplots()
    steps = np.arange(1, max(taken) + 1)[:, None]
    axes.imshow(steps <= np.array(taken), cmap=ListedColormap(["#e8ecf0", "#2f6fb7"]), vmin=0, vmax=1)
    axes.set(xlabel="position", ylabel="step", yticks=range(len(steps)), yticklabels=steps[:, 0])
    axes.set(xticks=range(len(taken)), xticklabels=range(len(taken)))
    axes.set_title("computed, and copied once halted", **plots.PANEL_TITLE)
    axes.set_xticks(np.arange(0.5, len(taken) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(steps) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    plots.save(figure, file)


@plots.styled
def draw_spans(file: Path, spans: Sequence[int] = (0, 6, 16, 30), ramp: int = 8, length: int = 48) -> None:
    """How much each head's soft mask lets through, by distance."""
    figure = plots.new_figure(4.6, 2.4)
    axes = figure.subplots()
    distances = np.arange(length)
    for span in spans:
        axes.plot(distances, np.clip((ramp + span - distances) / ramp, 0, 1), linewidth=1.4, label=f"span {span}")
    axes.set(xlabel="tokens back", ylabel="soft mask", ylim=(-0.03, 1.05))
    axes.legend(fontsize=8)
    plots.save(figure, file)


@plots.styled
def draw_globals(file: Path, length: int = 36, block: int = 3) -> None:
    """What queries see (down) of keys (right): a window and a global token, and BigBird's blocks and edges."""
    near = {"type": "block_1d", "block": block, "flange": block, "flange_after": block}
    random = {"type": "big_bird_blocks", "block": block, "count": 1, "heads": 1, "longest": length}
    panels = (
        ("Longformer: a window, the first token", [{"type": "local", "window": 5}], [0]),
        ("BigBird: near blocks, random ones, edges", [near, random], [*range(block), *range(length - block, length)]),
    )
    figure = plots.new_figure(6.4, 3.4)
    for axes, (title, parts, marked) in zip(figure.subplots(1, 2), panels):
        codes = np.zeros((length, length), dtype=int)
        for code, part in reversed(list(enumerate(parts, 1))):  # what is near covers what is random
            pattern = pattern_from_dict(part).bind((length,))
            seen = [[bool(pattern.visible(0, query, key)) for key in range(length)] for query in range(length)]
            codes[np.array(seen)] = code
        codes[marked, :] = codes[:, marked] = 3
        axes.imshow(codes, cmap=ListedColormap(["#e8ecf0", "#2f6fb7", "#9dc3ea", "#d9730d"]), vmin=0, vmax=3)
        axes.set_title(title, **plots.PANEL_TITLE)
        axes.set(xticks=np.arange(0.5, length - 1), yticks=np.arange(0.5, length - 1))
        axes.grid(color="white", linewidth=0.4)
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
    plots.save(figure, file)


def main() -> None:
    make_claims()
    for system in SYSTEMS:
        make_page(system.name, system.prefix)
        if system.name in PICTURES:
            draw(system.name)
    draw_windows(FOLDER / "swin_transformer.png")
    draw_memory(FOLDER / "transformer_xl.png", memory=8)
    draw_memory(FOLDER / "compressive_transformer.png", places=3)
    draw_store(FOLDER / "memorizing_transformer.png")
    draw_spans(FOLDER / "adaptive_span.png")
    draw_steps(FOLDER / "universal_transformer.png")
    draw_globals(FOLDER / "long_encoder.png")
    draw_masks(FOLDER / "vanilla_encoder.png", masks_of_encoder())
    square = np.ones((8, 8))
    stacks = {"encoder on itself": square, "decoder on itself": np.tri(8), "decoder on encoder": square}
    draw_masks(FOLDER / "vanilla_transformer.png", stacks)


if __name__ == "__main__":
    main()
