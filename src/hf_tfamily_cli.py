"""The command `hf-tfamily`: train, evaluate, sample, push, convert, show, recipes, sources, new-recipe and others.

What is wrong with a request is said in one line, with exit code 2. A module of its own, outside the package: that
imports torch, which the commands need and `--help` does not.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

# glibc then maps what is larger than 128 KiB by itself and gives it back once it is freed (mallopt(3)); left alone, it
# learns to keep up to 32 MiB in heaps, which the activations of many layers tear. It reads this as a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

app = typer.Typer(
    help="The Transformer family as Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe, model.hidden_size=64 say.")
]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a finished model.", exists=True, file_okay=False)
]
AnyModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a model, a finished run's say, or a repository on the Hub.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="bytes, a folder, or a name on the Hub [default: the tokenizer beside the model]"),
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.")]
show_traceback = False


def _version(asked: bool) -> None:
    if asked:
        print(f"hf-tfamily {metadata.version('hf-tfamily')}")
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option(help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    global show_traceback
    show_traceback = traceback


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see `recipes`), or a YAML file.")],
    output: Annotated[Path | None, typer.Option(help="Finished folder [default: runs/<system>-<recipe>]")] = None,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    weights: Annotated[
        str | None, typer.Option(help="Folder or Hub repository of a model to fine-tune [default: new weights]")
    ] = None,
) -> None:
    """Train a recipe; also under `torchrun` and `accelerate launch`."""
    with _one_line_errors():
        from accelerate import PartialState

        from hf_tfamily import training
        from hf_tfamily.recipes import load_recipe

        _quiet()
        loaded = load_recipe(recipe, overrides)
        output = output or training.default_output(loaded)
        try:
            training.train(loaded, output, resume=resume, overwrite=overwrite, weights=weights)
        except (KeyboardInterrupt, training.Terminated) as stop:
            again = ["hf-tfamily", "train", recipe, "--output", str(output), "--resume"]
            again += [word for override in overrides for word in ("--set", override)]
            again += [] if weights is None else ["--weights", weights]
            what = "Interrupted" if isinstance(stop, KeyboardInterrupt) else "Terminated"
            errors.print(f"\n{what}. To go on: {escape(shlex.join(again))}", soft_wrap=True)
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    if PartialState().is_main_process:
        _report(output)
    PartialState().destroy_process_group()  # its threads would otherwise outlive what they use


def _report(folder: Path) -> None:
    """What a finished run has to say."""
    from hf_tfamily.finished import task_in

    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    task = task_in(folder)
    console.print(
        f"\n[bold]{escape(task.summary(metrics))}[/]\n"
        f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps in {metrics['seconds']:.0f} s"
    )
    for name in ("samples.png", "samples.txt", "confusion.png", "loss.png"):
        if (folder / name).exists():
            console.print(f"{name.partition('.')[0].capitalize() + ':':11}{escape(str(folder / name))}")
    auto_class = task.auto_class.__name__
    console.print(
        "\nLoad it:\n"
        "  import hf_tfamily\n"
        f"  from transformers import {auto_class}\n"
        f'  model = {auto_class}.from_pretrained("{escape(str(folder))}")'
    )


@app.command()
def evaluate(
    model: AnyModel,
    overrides: Overrides = [],  # noqa: B006
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="KEY=VALUE",
            help="What to measure on: source=bible_stream, length=128 [default: what its recipe says]",
        ),
    ] = None,
    tokenizer: TokenizerOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples or streams at once.")] = 32,
    attention_length: Annotated[
        int | None, typer.Option(min=1, help="Streams of text: keys that each query sees [default: as in training]")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Streams of text: also measure single tokens with so much context, 100,200 say.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Streams of text: draw the loss at each place in a segment. Classes: what is taken for what."
        ),
    ] = None,
) -> None:
    """Figures of a model on held-out data: those that it was trained for, or what --data says."""
    with _one_line_errors():
        from hf_tfamily import finished

        _quiet()
        contexts = _integers(context, "--context") if context is not None else None
        options = _given(attention_length=attention_length, context=contexts, plot=plot)
        asked = {"data": data or [], "tokenizer": tokenizer, **options}
        task, metrics = finished.measure(model, overrides, batch_size, **asked)
        console.print(f"[bold]{escape(task.summary(metrics))}[/]")
        if plot is not None:
            console.print(f"Picture: {escape(str(plot))}")


@app.command()
def sample(
    model: AnyModel,
    classes: Annotated[str | None, typer.Option(help="Classes to draw, such as 0,1,2 [default: all]")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Samples, of each class where there are classes.")] = None,
    output: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("samples.png"),
    seed: Seed = 0,
    temperature: Annotated[float | None, typer.Option(min=1e-3, help="Below 1: likelier, less varied.")] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option("--pictures", help="Picture to enlarge or to classify, as often as you like.", exists=True),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on with, to translate, or to fill in; - for standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The same from a file.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to make at most.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that have this share.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens come back less.")] = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Sample a model: pictures as a PNG; text, which may go on with a prompt, and classes to the terminal."""
    with _one_line_errors():
        from transformers import set_seed

        from hf_tfamily.finished import check_options, open_model, task_in
        from hf_tfamily.model_folders import local_folder
        from hf_tfamily.prompts import read_prompt

        _quiet()
        folder = local_folder(model)
        for flag, value in (("--top-p", top_p), ("--repetition-penalty", repetition_penalty)):
            if value is not None and not (value > 0 and (value <= 1 or flag != "--top-p")):
                raise ValueError(f"{flag} must be above 0{' and at most 1' * (flag == '--top-p')}, got {value}.")
        chosen = _integers(classes, "--classes") if classes is not None else None
        options = _given(
            **{"classes": chosen, "count": count, "temperature": temperature, "pictures": pictures},
            **{"prompt": prompt if prompt is not None else prompt_file, "max_new_tokens": max_new_tokens},
            **{"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty},
        )
        check_options(options, task_in(folder).sampling_options, "sampled")
        if "prompt" in options:
            options["prompt"] = read_prompt(prompt, prompt_file)
        finished = open_model(folder, tokenizer)
        set_seed(seed)
        for text in finished.task.sample(finished.model, finished.processor, output, **options):
            if "\n" in text:
                console.rule()
            console.print(text, markup=False, soft_wrap=True)


def _given(**options: object) -> dict[str, object]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _integers(text: str, flag: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} must be whole numbers such as 0,1,2, got {text!r}.") from None


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    without_code: Annotated[
        bool, typer.Option("--without-code", help="Leave the model's code out: readers then need this package.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there [default: main]")] = None,
) -> None:
    """Upload a finished model to the Hub as one commit: weights, configuration, card, and the code that runs them."""
    with _one_line_errors():
        from hf_tfamily import hub

        _quiet()
        pushed = hub.push(folder, repository, private=private, with_code=not without_code, revision=revision)
        if pushed.left_out:
            console.print(f"Left out, being pickles: {escape(', '.join(pushed.left_out))}")
        console.print(f"{len(pushed.files)} files: {escape(pushed.url)}", soft_wrap=True)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub repository of a checkpoint.")],
    destination: Annotated[Path | None, typer.Argument(help="New folder; not needed with --dry-run.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="Type to become, where there is a choice.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which weights fit; write nothing.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Run both models; refuse if their logits differ.")] = False,
    pickled_weights: Annotated[
        bool, typer.Option("--pickled-weights", help="Read a pickle, as weights only, where there is nothing else.")
    ] = False,
    max_positions: Annotated[
        int | None, typer.Option(help="BERT, RoBERTa: tokens to have positions for, copied along [default: 4096]")
    ] = None,
    attention_window: Annotated[
        int | None, typer.Option(help="BERT, RoBERTa: tokens that a token sees [default: 512]")
    ] = None,
) -> None:
    """Turn a checkpoint of a stock class into one of this family, or back."""
    with _one_line_errors():
        from hf_tfamily import conversion

        _quiet()
        asked = _given(max_positions=max_positions, attention_window=attention_window)
        length = conversion.Length(**asked) if asked else None
        if dry_run:
            result = conversion.dry_run(source, target, pickled_weights, length)
        elif destination is None:
            raise ValueError("Say where to write: a new folder, or --dry-run.")
        else:
            result = conversion.convert(source, destination, target, pickled_weights, check, length)
        console.print(f"{result.architecture} ({result.model_type}): {result.fit.matched} weights fit")
        if result.difference is not None:
            console.print(f"Largest difference of logits: {result.difference:.1e} of the largest")
        for problem in ("left_over", "missing", "misshapen"):
            for name in getattr(result.fit, problem):
                console.print(f"{problem.replace('_', ' ')}: {escape(name)}")
        if dry_run and any(result.fit[1:]):
            raise typer.Exit(1)


@app.command()
def consolidate(
    checkpoint: Annotated[
        Path, typer.Argument(help="OUTPUT.partial/checkpoint-N of a run.", exists=True, file_okay=False)
    ],
    output: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Put a sharded checkpoint (FSDP2) together: a folder with safetensors that loads like any model."""
    with _one_line_errors():
        from hf_tfamily import checkpoints

        _quiet()
        checkpoints.consolidate(checkpoint, output)
        console.print(f"Model: {escape(str(output))}")


@app.command()
def show(
    what: Annotated[
        str | None, typer.Argument(metavar="RECIPE|PATTERN", help="A recipe, or a pattern such as local:window=8")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens to draw [default: four periods]")] = None,
    output: Annotated[Path | None, typer.Option(help="Also draw a PNG.")] = None,
    gallery: Annotated[Path | None, typer.Option(help="Draw every pattern there is into this PNG.")] = None,
) -> None:
    """Which keys do queries see? Patterns in the terminal and as pictures.

    A pattern is JSON, or fixed:block=8,summary=2. Join patterns by + for their union, by / for taking turns over heads.
    """
    with _one_line_errors():
        from hf_tfamily import pattern_views, plots

        if gallery is not None:
            plots.pattern_pictures(pattern_views.gallery(), gallery, "Which keys does a query see?")
            console.print(f"Picture: {escape(str(gallery))}")
        if what is None:
            if gallery is None:
                raise ValueError("Say what to show: a recipe, a pattern, or --gallery FILE.")
            return
        if pattern_views.looks_like_pattern(what):
            panels = pattern_views.pattern_panels(pattern_views.parse_pattern(what), length)
        else:
            panels = _show_recipe(what, length)
        for panel in panels:
            view = panel.matrix()
            keys = pattern_views.keys_per_query(view)
            console.print(f"\n[bold]{escape(panel.title)}[/]  {escape(panel.note)}")
            console.print(f"{panel.length} tokens, {keys:.1f} keys per query")
            console.print("\n".join(pattern_views.as_text(view)), markup=False)
        if output is not None:
            plots.pattern_pictures(panels, output, title=what)
            console.print(f"\nPicture: {escape(str(output))}")


def _show_recipe(name: str, length: int | None) -> list:
    """Print what the recipe's model is; return the panels of its patterns."""
    from transformers import AutoConfig

    from hf_tfamily.model_size import count_parameters
    from hf_tfamily.pattern_views import config_panels
    from hf_tfamily.recipes import load_recipe
    from hf_tfamily.tasks import task_of

    recipe = load_recipe(name)
    config = AutoConfig.for_model(**recipe.model)
    parameters = count_parameters(task_of(recipe).auto_class, config)
    console.print(f"[bold]{escape(recipe.name)}[/]  {escape(recipe.title)}")
    if recipe.reference:
        console.print(recipe.reference, markup=False)
    if getattr(config, "depths", None):
        shape = (
            f"stages of {config.depths} blocks, the last of width {config.hidden_size}, with {config.num_heads} heads"
        )
    else:
        shape = (
            f"{config.num_hidden_layers} layers of width {config.hidden_size} with {config.num_attention_heads} heads"
        )
    console.print(f"{parameters:,} parameters, {shape}")
    return config_panels(config, length)


@app.command()
def sources(
    name: Annotated[str | None, typer.Argument(metavar="SOURCE", help="One of them [default: a list]")] = None,
) -> None:
    """Where data can come from, and what each source takes."""
    with _one_line_errors():
        from hf_tfamily.data.descriptions import arguments, list_sources, recipes_of, sentence

        if name is None:
            rows = [(source, kind, sentence(source)) for source, kind in list_sources()]
            console.print(_table(["source", "what for", "what it is"], rows))
            return
        rows = [(argument.name, argument.kind, argument.default, argument.meaning) for argument in arguments(name)]
        console.print(sentence(name), markup=False)
        console.print(_table(["argument", "type", "default", "meaning"], rows))
        for line in recipes_of(name):
            console.print(line, markup=False, soft_wrap=True)


@app.command()
def new_recipe(
    source: Annotated[str, typer.Argument(help="What kind of data, such as text_file_stream; see `sources`")],
    paths: Annotated[list[Path], typer.Argument(help="Your file or folder; two files for a translation")],
    system: Annotated[str | None, typer.Option(help="Model to train [default: the first that fits]")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the source, such as column=price")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The recipe [default: PATH's name with .yaml, here]")] = None,
) -> None:
    """Write a recipe for your own data, with sizes that suit them; `hf-tfamily train FILE.yaml` trains it."""
    with _one_line_errors():
        from hf_tfamily import new_recipes

        _quiet()
        output = output or Path(f"{paths[0].stem}.yaml")
        if output.exists():
            raise FileExistsError(f"{output} is there already; choose another --output.")
        recipe = new_recipes.new_recipe(source, paths, system, data or [])
        new_recipes.write_recipe(recipe, output)
        console.print(f"Recipe:    {escape(str(output))}  ({recipe.parameters:,} parameters)", soft_wrap=True)
        console.print(f"Train it:  hf-tfamily train {escape(shlex.quote(str(output)))}", soft_wrap=True)


@app.command()
def info(
    attention: Annotated[bool, typer.Option(help="Also try every attention implementation on every device.")] = False,
) -> None:
    """Versions, devices, and what runs block_sparse on them."""
    with _one_line_errors():
        from hf_tfamily import system_info

        _quiet()
        console.print(_table(["package", "version"], system_info.versions()))
        console.print(_table(["device", "what it is"], system_info.devices()))
        console.print(_table(["device", "what runs block_sparse"], system_info.block_sparse_executors()))
        if attention:
            with console.status("Trying every attention implementation; FlexAttention compiles first ..."):
                rows = system_info.attention_implementations()
            console.print(_table(["attention", "device", "forward", "backward"], rows))


@app.command()
def recipes() -> None:
    """The recipes that come with the package."""
    import yaml

    package = Path(find_spec("hf_tfamily").origin).parent  # not imported: a list need not wait for torch
    places = (package / "configs", package.parents[1] / "configs")  # installed, and editable
    folder = next(place for place in places if place.is_dir())
    rows = []
    for file in sorted(folder.glob("*/*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "title" in content:  # configuration files of launchers have none
            rows.append((f"{file.parent.name}/{file.stem}", f"{content['parameters']:,}", content["title"]))
    console.print(_table(["recipe", "parameters", "what it is"], rows))


@app.command()
def reproduce(
    claim: Annotated[str | None, typer.Argument(help="Name of a claim [default: list them]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds: does it run? Without a name, every claim.")] = False,
    output: Annotated[Path, typer.Option(help="Keeps models and results; a later call goes on.")] = Path("runs/claims"),
    page: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a page, a picture and the results.")] = None,
) -> None:
    """Look for a paper's claim, and say whether it is found."""
    with _one_line_errors():
        from hf_tfamily import reproduction

        _quiet()
        if claim is None and not quick:
            claims = {name: reproduction.load_claim(name) for name in reproduction.list_claims()}
            rows = [(name, found.system, found.statement) for name, found in claims.items()]
            console.print(_table(["claim", "system", "what is claimed"], rows))
            return
        for name in reproduction.list_claims() if claim is None else [claim]:
            reproduction.reproduce(name, output, quick, page)


knn_app = typer.Typer(help="A memory outside the model: kNN-LM, for any causal language model.", no_args_is_help=True)
app.add_typer(knn_app, name="knn")

CausalModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of a causal language model.")
]
Store = Annotated[Path, typer.Option(help="Folder of a datastore.", exists=True, file_okay=False)]
Texts = Annotated[list[Path] | None, typer.Option("--text", help="UTF-8 file, as often as you like.", exists=True)]
DataRecipe = Annotated[str | None, typer.Option("--data", metavar="RECIPE", help="The text of a recipe instead.")]
Neighbours = Annotated[int | None, typer.Option("--k", help="Neighbours of a token [default: 1024, or all]")]
Lists = Annotated[int, typer.Option(min=1, help="Lists of an ivfpq index that a token reads.")]
Window = Annotated[int | None, typer.Option(min=1, help="Tokens read at once.")]
Context = Annotated[int | None, typer.Option(min=0, help="Of them, those that only help to predict the others.")]


@knn_app.command("build")
def knn_build(
    model: CausalModel,
    output: Annotated[Path, typer.Option(help="New folder.")],
    text: Texts = None,
    data: DataRecipe = None,
    overrides: Overrides = [],  # noqa: B006
    keys: Annotated[str, typer.Option(help="ffn_input, final, or the name of a module.")] = "ffn_input",
    window: Window = None,
    context: Context = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 4,
    limit: Annotated[int | None, typer.Option(min=2, help="Tokens of each text to take [default: all]")] = None,
    dtype: Annotated[str, typer.Option(help="Of keys: float16 or float32.")] = "float16",
    index: Annotated[str, typer.Option(help="flat (exact), ivfpq, or auto, by size.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a store that was cut off.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Make a datastore: for every token of a text the model's state before it, and the token."""
    with _one_line_errors():
        from hf_tfamily import knn

        _quiet()
        loaded, tokenizer = knn.load_model(model)
        documents = knn.read_tokens(tokenizer, text, data, overrides, held_out=False)
        try:
            store = knn.build_datastore(
                loaded,
                [document[:limit] for document in documents],
                output,
                tokenizer,
                **{"keys": keys, "window": window, "context": context, "batch_size": batch_size},
                **{"dtype": dtype, "index": index, "resume": resume, "overwrite": overwrite},
                progress=True,
                say=lambda line: console.print(escape(line), soft_wrap=True),
            )
        except KeyboardInterrupt:
            errors.print("\nInterrupted. To go on, give the same command and --resume.")
            raise typer.Exit(130) from None
        console.print(
            f"[bold]{len(store):,} entries[/] of width {store.keys.shape[1]}, {store.kind}: {escape(str(output))}"
        )


@knn_app.command("evaluate")
def knn_evaluate(
    model: CausalModel,
    store: Store,
    text: Texts = None,
    data: DataRecipe = None,
    overrides: Overrides = [],  # noqa: B006
    k: Neighbours = None,
    temperature: Annotated[float | None, typer.Option(help="Distances are divided by it [default: tuned]")] = None,
    lmbda: Annotated[float | None, typer.Option("--lambda", help="Share of the neighbours [default: tuned]")] = None,
    tuned_on: Annotated[float, typer.Option(help="Share of the text that tunes; the rest is reported.")] = 0.5,
    nprobe: Lists = 32,
    window: Window = None,
    context: Context = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 4,
    limit: Annotated[int | None, typer.Option(min=2, help="Tokens of each text to take [default: all]")] = None,
    rebuild_index: Annotated[
        bool, typer.Option("--rebuild-index", help="First make the index anew: for a store of somebody else.")
    ] = False,
) -> None:
    """Perplexity of a text with and without neighbours; of a recipe's data, the held-out part."""
    with _one_line_errors():
        from hf_tfamily import knn

        _quiet()
        opened = knn.Datastore(store)
        loaded, tokenizer = knn.load_model(model)
        documents = knn.read_tokens(tokenizer, text, data, overrides, held_out=True)
        if rebuild_index:
            opened.rebuild_index()
        figures = knn.evaluate(
            loaded,
            opened,
            [document[:limit] for document in documents],
            tokenizer,
            **{"k": k, "temperature": temperature, "lmbda": lmbda, "tuned_on": tuned_on, "nprobe": nprobe},
            **{"window": window, "context": context, "batch_size": batch_size},
            progress=True,
        )
        rows = [
            ("the model alone", f"{figures['perplexity']:.3f}", f"{figures['bits_per_token']:.4f}"),
            ("with neighbours", f"{figures['knn_perplexity']:.3f}", f"{figures['knn_bits_per_token']:.4f}"),
        ]
        console.print(_table([f"{figures['tokens']:,} tokens", "perplexity", "bits per token"], rows))
        how = f"tuned on {figures['tuned_tokens']:,} tokens before" if figures["tuned_tokens"] else "as given"
        console.print(
            f"k = {figures['k']}, lambda = {figures['lmbda']:.2f}, temperature = {figures['temperature']:.6g} ({how}); "
            f"{figures['found']:.1%} of the tokens follow one of their neighbours"
        )


@knn_app.command("sample")
def knn_sample(
    model: CausalModel,
    store: Store,
    prompt: Annotated[list[str], typer.Option(help="Text to go on with, as often as you like.")],
    k: Neighbours = None,
    temperature: Annotated[float, typer.Option(help="Distances are divided by it.")] = 1.0,
    lmbda: Annotated[float, typer.Option("--lambda", help="Share of the neighbours.")] = 0.25,
    nprobe: Lists = 32,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token, do not draw.")] = False,
    seed: Seed = 0,
) -> None:
    """Go on with a text, neighbours voting on each token."""
    with _one_line_errors():
        from transformers import set_seed

        from hf_tfamily import knn

        _quiet()
        opened = knn.Datastore(store)
        loaded, tokenizer = knn.load_model(model)
        set_seed(seed)
        options = {"lmbda": lmbda, "temperature": temperature, "k": k, "nprobe": nprobe}
        for written in knn.continue_texts(loaded, opened, tokenizer, prompt, tokens, greedy, **options):
            console.print(written, markup=False, soft_wrap=True)


def _table(columns: list[str], rows: list[tuple[str, ...]]) -> Table:
    table = Table(Column(columns[0], no_wrap=True), *columns[1:], box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A refused value, a missing package or file: one line and exit code 2."""
    try:
        yield
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        refused = (ValueError, ImportError, OSError, StrictDataclassError, RecursionError)
        if show_traceback or not isinstance(error, refused):
            raise
        if isinstance(error, RecursionError):
            error = "lists, mappings or patterns are nested too deeply to be read."
        elif isinstance(error, ImportError):
            from hf_tfamily.missing_packages import how_to_install

            error = how_to_install(error) or error
        from hf_tfamily.secret_values import without_secrets

        errors.print(f"[bold red]Error:[/] {escape(without_secrets(str(error)))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _quiet() -> None:
    """No progress bars for loading and saving; those for training, evaluating and sampling stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def train_under_allocator() -> None:
    """For `hf-tfamily train` start this process again under ALLOCATOR, once, unless the user has set up glibc's malloc.

    The process stays the same one, so signals and its exit code are as they would be.
    """
    words = sys.argv[1:]
    is_train = next((word for word in words if not word.startswith("-")), None) == "train"
    is_own = sys.orig_argv[-len(words) :] == words  # the command line of this process, not one that a program made up
    chosen = any(name in os.environ for name in (*ALLOCATOR, "GLIBC_TUNABLES"))
    if is_train and is_own and not chosen and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def main() -> None:
    train_under_allocator()
    app()
