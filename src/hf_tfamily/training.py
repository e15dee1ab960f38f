"""Train a recipe with the stock Trainer.

While a run lasts, everything it writes is in `OUTPUT.partial/`: the recipe and the Trainer's checkpoints. The finished
model is put together in there too and appears as `OUTPUT` by one rename, so whatever is at OUTPUT is whole.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback

from . import plots
from .card import model_card
from .checkpoints import DESCRIPTION, check_engine_of, checkpoints_in, damage, describe, from_main, newest_whole
from .data import LoadedData, load_data
from .data.sequences import require
from .divergence import ADVICE, DivergenceError, check_finite, stop_at_divergence
from .file_permissions import UsualPermissions
from .finished import RECIPE_FILE, has_same_ids
from .hub import export
from .kept_activations import KEPT_ACTIVATIONS
from .label_smoothing import smooth_inside
from .manifest import ManifestWriter
from .model_size import check_memory
from .pattern_views import config_panels, model_length
from .processes import is_sharded, prepare_for_processes, whole_model
from .recipe_yaml import write_yaml
from .recipes import OWN_TRAINING, Recipe, RecipeError, load_recipe
from .recurrent_training import RecurrentTrainer as RecurrentTrainer
from .run_errors import RunError, explaining_disks
from .run_lock import locked
from .secret_values import refuse_secrets
from .tasks import Task, task_of
from .termination import SaveAtSigterm
from .termination import Terminated as Terminated
from .whole_files import write_text

# What a run's working folder holds beside the files of loggers.
WORKING_FILES = (
    *("finished", "replaced-*", "checkpoint-*", "tmp-checkpoint-*", "activations-*", "recipe.*", "trainer_state.json"),
    *("damaged-checkpoint-*", DESCRIPTION),
)


def train(
    recipe: Recipe,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    weights: str | Path | None = None,
) -> Path:
    """Train `recipe` and return the folder of the finished model. Under torchrun or accelerate, every rank calls this.

    SIGTERM saves a checkpoint and raises Terminated, which ends the process with exit code 143.

    Args:
        output: the finished folder; `runs/<system>-<recipe>` if None.
        resume: go on from the last whole checkpoint of an interrupted run of the same recipe, if there is one.
        overwrite: throw an interrupted run away, and replace a finished model once the new one is finished.
        weights: folder or Hub repository of a model to fine-tune; layers of another size, such as a classifier of other
            classes, start anew. The recipe that is left with the model says so.

    Raises:
        RunError: if `output` or `output.partial` exists and neither flag says what to do with it; if another process
            trains into it; if a run is to be resumed and all its checkpoints are damaged; if the disk takes no more.
        DivergenceError: at the first loss or norm of gradients that is not finite; the last good checkpoint stays.
        RecipeError: if the recipe's model, data and training do not fit each other or are refused.
        MissingPackageError: if the data or the pictures need a package that is not installed.
    """
    require("matplotlib")
    refuse_secrets(asdict(recipe), recipe.name, RecipeError)
    if weights is not None:
        recipe = replace(recipe, notes=(*recipe.notes, f"Training began with the weights of {weights}."))
    run, task = RunFolder(output or default_output(recipe)), task_of(recipe)
    with _blaming(recipe, "training"):
        arguments = _training_arguments(recipe, task, run.partial)
    sigterm = SaveAtSigterm()
    lock = run.locked() if arguments.process_index == 0 else nullcontext()
    with sigterm.listening(), lock, explaining_disks(run.partial):
        return _train_in(run, recipe, task, arguments, resume, overwrite, weights, sigterm)


def _train_in(
    run: "RunFolder",
    recipe: Recipe,
    task: Task,
    arguments: TrainingArguments,
    resume: bool,
    overwrite: bool,
    weights: str | Path | None,
    sigterm: SaveAtSigterm,
) -> Path:
    """Train in a folder that is this run's own."""
    is_main = arguments.process_index == 0
    if is_main:
        run.check(recipe, resume, overwrite)
    with _blaming(recipe, "model"):
        config = AutoConfig.for_model(**recipe.model)  # before data are read, which may take long
        check_memory(task.auto_class, config)
    with arguments.main_process_first(local=False), _blaming(recipe, "data"):
        data = load_data(recipe.data)
        _check_tokenizer_of(weights, recipe, data)
    set_seed(arguments.seed)
    with _blaming(recipe, "model"):
        model = task.build_model(config, data)
        model = model if weights is None else _with_weights(model, weights)
    with _blaming(recipe, "training"):
        trainer = task.build_trainer(model, arguments, data)
        smooth_inside(trainer)
        _watch(trainer, task)
        held = prepare_for_processes(trainer, recipe.training.get("ddp_comm_hook"))
        stop_at_divergence(trainer)
    with arguments.main_process_first(local=False):
        if is_main:
            run.open(recipe, resume)
            if is_sharded(trainer):
                describe(model, data.processor, run.partial)
    trainer.add_callback(ManifestWriter(arguments))
    trainer.add_callback(sigterm)  # last: it ends the run
    checkpoint = from_main(lambda: newest_whole(run.partial, tqdm.write)) if resume else None
    if checkpoint is not None:
        check_engine_of(Path(checkpoint), trainer)
    keep_activations = KEPT_ACTIVATIONS[recipe.training.get("kept_activations") or "memory"]
    with run.naming_the_last_checkpoint(), keep_activations(run.partial):
        trainer.train(checkpoint, ignore_keys_for_eval=["past_key_values"])
    whole = whole_model(trainer)
    from_main(lambda: run.publish(lambda folder: _finish(whole, held.bytes, trainer, task, recipe, data, folder)))
    return run.output


def default_output(recipe: Recipe) -> Path:
    return Path("runs") / f"{recipe.model['model_type']}-{Path(recipe.name).stem}"


class RunFolder:
    """Where a run writes: `output` once it is finished, `partial` until then. Of a link the target is written."""

    def __init__(self, output: str | Path):
        self.given = Path(output)
        self.output = self.given.resolve() if self.given.is_symlink() else self.given
        self.partial = _beside(self.output, ".partial")

    def locked(self) -> AbstractContextManager[None]:
        """Keep other runs out; RunError if one is here."""
        return locked(_beside(self.output, ".lock"))

    def check(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """Raise RunError if something is here that the flags give no leave to continue or to replace."""
        interrupted = (self.partial / RECIPE_FILE).exists()
        beside_link = _beside(self.given, ".partial")
        if self.given.is_symlink() and beside_link.exists() and beside_link.resolve() != self.partial:
            raise RunError(f"{self.given} is a link to {self.output}; move {beside_link} to {self.partial}.")
        if _holds_something(self.output) and not (self.output / "config.json").exists():
            raise RunError(f"{self.output} exists and holds no model; choose another --output.")
        if _holds_something(self.output) and not overwrite and not interrupted:
            raise RunError(
                f"{self.output} holds a finished model, and there is no interrupted run to --resume; "
                "replace it by --overwrite, or choose another --output."
            )
        if _holds_something(self.partial) and not (resume or overwrite):
            raise RunError(
                f"{self.partial} holds an interrupted run; go on with it by --resume, throw it away by --overwrite, "
                "or choose another --output."
            )
        if resume and not overwrite and not interrupted and checkpoints_in(self.partial):
            raise RunError(
                f"{self.partial / RECIPE_FILE} is missing, which says what run the checkpoints beside it are of; put "
                "it back, throw them away by --overwrite, or choose another --output."
            )
        if resume and interrupted:
            self._check_same_recipe(recipe)

    def _check_same_recipe(self, recipe: Recipe) -> None:
        """An interrupted run goes on with its own recipe only."""
        recorded = replace(load_recipe(self.partial / RECIPE_FILE), name=recipe.name)
        if recorded != recipe:
            raise RunError(
                f"{self.partial} holds a run of another recipe ({_differences(recorded, recipe)}); give --resume the "
                "same recipe and --set, throw it away by --overwrite, or choose another --output."
            )

    def open(self, recipe: Recipe, resume: bool) -> None:
        """Make `partial` the working folder: as it is where a run is resumed, else a new one."""
        recorded = self.partial / RECIPE_FILE
        if resume and recorded.exists():
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        write_text(recorded, recipe_yaml(recipe))

    @contextmanager
    def naming_the_last_checkpoint(self) -> Iterator[None]:
        """A run that diverges says what is left of it."""
        try:
            yield
        except DivergenceError as error:
            last = next((folder for folder in reversed(checkpoints_in(self.partial)) if damage(folder) is None), None)
            kept = "There is no checkpoint from before." if last is None else f"The last good checkpoint is {last}."
            raise DivergenceError(f"{error} {kept}") from error

    def publish(self, write) -> None:
        """Let `write(folder)` fill a folder, and make it `output` by a rename; then the working files go.

        What loggers wrote into the working folder, such as TensorBoard's `runs`, is copied along.
        """
        finished = self.partial / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        write(finished)
        self._copy_logs(finished)
        replaced = self.partial / f"replaced-{time.time_ns()}"
        if self.output.exists():
            self.output.rename(replaced)
        try:
            finished.rename(self.output)
        except OSError:
            if replaced.exists():
                replaced.rename(self.output)
            raise
        # Without its recipe a partial folder is rubbish, so a kill between these two lines leaves nothing to resume.
        (self.partial / RECIPE_FILE).unlink()
        shutil.rmtree(self.partial)

    def _copy_logs(self, finished: Path) -> None:
        """Everything in `partial` that is neither ours nor the Trainer's."""
        for path in self.partial.iterdir():
            if any(path.match(pattern) for pattern in WORKING_FILES) or (finished / path.name).exists():
                continue
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, finished / path.name)


class Stopwatch(TrainerCallback):
    """Stamps every entry of the log with the seconds trained so far, those before a resume included."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic() - max((entry.get("seconds", 0) for entry in state.log_history), default=0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.start, 1)


class LossProgress(ProgressCallback):
    """The Trainer's progress bar, with losses in the task's own unit."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = {"loss": "training", "eval_loss": "held out"}
        unit = self.task.loss_unit
        shown = [f"{name} {logs[key] / self.task.nats:.3f} {unit}" for key, name in losses.items() if key in logs]
        if shown and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step:>6}  {'  '.join(shown)}")


def _training_arguments(recipe: Recipe, task: Task, folder: Path) -> TrainingArguments:
    ours = {"output_dir": str(folder), "label_names": list(task.label_names)}
    for key in ours:
        if key in recipe.training:
            raise ValueError(f"{key} cannot be set; it is what `train` decides (see --output).")
    if recipe.training.get("enable_jit_checkpoint"):
        raise ValueError("enable_jit_checkpoint is not for `train`, which saves at SIGTERM by itself; leave it out.")
    for field in fields(TrainingArguments):
        value = recipe.training.get(field.name)
        if isinstance(value, str) and isinstance(field.default, (int, float)):
            raise ValueError(f"{field.name} must be a number or true or false, got {value!r}.")
    cpu = not torch.accelerator.is_available()
    defaults = {"use_cpu": cpu, "dataloader_pin_memory": not cpu, "report_to": "none", "save_total_limit": 2}
    defaults["logging_nan_inf_filter"] = False  # it shows averages in the place of losses that are NaN
    asked = {key: deepcopy(value) for key, value in recipe.training.items() if key not in OWN_TRAINING}
    arguments = TrainingArguments(**{**defaults, **asked, **ours})
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ValueError("fp16=true would compute in float32 on a CPU, as Accelerate has it; use bf16=true.")
    return arguments


def _check_tokenizer_of(weights: str | Path | None, recipe: Recipe, data: LoadedData) -> None:
    """Raise ValueError where a recipe's tokenizer numbers tokens otherwise than the model to fine-tune."""
    chosen = recipe.data.get("tokenizer")
    if weights is None or chosen is None or not Path(weights).is_dir() or has_same_ids(weights, data):
        return
    raise ValueError(f"tokenizer={chosen} is not the one beside {weights}; give data.tokenizer={weights}.")


def _with_weights(model: PreTrainedModel, weights: str | Path) -> PreTrainedModel:
    """The same model with a checkpoint's weights; those of another size are new."""
    loaded, said = type(model).from_pretrained(
        weights, config=model.config, dtype=model.dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    if missing := sorted(said["missing_keys"]):
        raise ValueError(
            f"{weights} lacks {len(missing)} weights, {missing[0]} for one; is it a {type(model).__name__}?"
        )
    if model.can_generate():
        loaded.generation_config = model.generation_config
    return loaded


def _watch(trainer: Trainer, task: Task) -> None:
    """Let the trainer keep the time, and show losses as the task does."""
    trainer.add_callback(Stopwatch())
    trainer.add_callback(UsualPermissions())
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # a bar, or in a notebook a table of nats
    trainer.add_callback(LossProgress(task))


def _finish(
    model: PreTrainedModel,
    held: int | None,
    trainer: Trainer,
    task: Task,
    recipe: Recipe,
    data: LoadedData,
    folder: Path,
) -> None:
    """Fill the finished folder: the whole model, what it reaches, samples, and a card."""
    history = trainer.state.log_history
    _say_if_nothing_was_learnt(history, task, data)
    model.config.use_cache = True  # the Trainer turned it off
    export(model, folder, data.processor)
    (folder / RECIPE_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
    picture = {} if task.evaluation_picture is None else {"plot": folder / task.evaluation_picture}
    metrics = {
        "recipe": recipe.name,
        **task.evaluate(model, data, batch_size=trainer.args.per_device_eval_batch_size, progress=True, **picture),
        "steps": trainer.state.global_step,
        "seconds": history[-1]["seconds"],
        "parameters": model.num_parameters(),
        "processes": trainer.args.world_size,
    }
    if held is not None:
        metrics["bytes_held_by_a_process"] = held
    check_finite(task.metric, metrics[task.metric], "on held-out data, though training was finite")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    plots.loss_curve(history, task.loss_unit, task.nats, task.uniform_loss(data), folder / "loss.png", recipe.name)
    if getattr(model.config, "attention_patterns", None) is not None:
        plots.pattern_pictures(config_panels(model.config, model_length(model.config)), folder / "patterns.png")
    task.write_samples(model, data, folder)
    model_card(recipe, task, data, metrics, folder).save(folder / "README.md")


def _say_if_nothing_was_learnt(history: list[dict], task: Task, data: LoadedData) -> None:
    """A large loss that is finite does not end a run, since losses come down again; at the end it is said."""
    losses, uniform = [entry["loss"] / task.nats for entry in history if "loss" in entry], task.uniform_loss(data)
    if losses and uniform is not None and losses[-1] > uniform:
        tqdm.write(
            f"Warning: the training loss ended at {losses[-1]:.4g} {task.loss_unit}, where a uniform guess costs "
            f"{uniform:.4g}: nothing was learnt. {ADVICE.capitalize()}."
        )


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load_recipe` reads, overrides applied."""
    content = {key: value for key, value in asdict(recipe).items() if key != "name" and value not in (None, "", ())}
    if recipe.notes:
        content["notes"] = list(recipe.notes)
    return f"# {recipe.name}\n" + write_yaml(content)


def _differences(recorded: Recipe, asked: Recipe) -> str:
    """The keys in which two recipes differ, such as "model.hidden_size is 64 there and 32 here"."""
    found = []
    for section in ("model", "data", "training"):
        there, here = getattr(recorded, section), getattr(asked, section)
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                found.append(f"{section}.{key} is {there.get(key)!r} there and {here.get(key)!r} here")
    return "; ".join(found) or "only its texts differ"


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _holds_something(path: Path) -> bool:
    """Is there a file, or a folder that is not empty?"""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


@contextmanager
def _blaming(recipe: Recipe, section: str) -> Iterator[None]:
    """Values that a section's maker refuses are the recipe's fault, and said in one line."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise RecipeError(f"{recipe.name}: {section}: {error}") from error
