"""Model cards, filled from facts: the recipe, the data, the figures, and what lies in the folder."""

import json
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .auto import SYSTEMS
from .data import LoadedData
from .recipes import Recipe
from .sampling import makes_pictures
from .tasks import Task

# Where to load a model from, as the cards of finished runs write it; `push` puts the repository's name there.
THIS_FOLDER = "path/to/this/folder"

# The Hub's name of what a model is for, by the Auto class that loads it.
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "translation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
# The same where an image processor is beside the model, so that its ids are pictures.
PICTURE_PIPELINES = PIPELINES | {
    "AutoModelForCausalLM": "unconditional-image-generation",
    "AutoModelForSeq2SeqLM": "image-to-image",
}
PICTURES = {
    "samples.png": "## Samples",
    "confusion.png": "## What is taken for what",
    "patterns.png": "## What each query sees",
    "loss.png": "## Training",
}

LOADING = """## Loading

With the package `hf-tfamily` installed:

```python
import hf_tfamily
from transformers import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("{{ place }}")
```
{% if with_code %}
Without it; the model's code is in this repository:

```python
from transformers import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("{{ place }}", trust_remote_code=True)
```
{% else %}
The model's code is not in this repository.
{% endif %}"""

RUN_TEMPLATE = (
    """---
{{ card_data }}
---

# {{ name }}

{{ recipe.title }}.

| | |
|---|---|
| System | {{ system }}{% if papers %}, {{ papers }}{% endif %} |
| Recipe | [recipe.yaml](recipe.yaml){% if recipe.reference %}, {{ recipe.reference }}{% endif %} |
| Data | {{ data.description }} |
| Licence of the data | {{ data.licence }} |
| Parameters | {{ "{:,}".format(metrics.parameters) }} |

## Figures

{{ task.summary(metrics) }}, after {{ metrics.steps }} steps in {{ metrics.seconds }} seconds of training.

`hf-tfamily train recipe.yaml` makes all of this; `hf-tfamily evaluate .` computes the held-out figure again. Both read
`recipe.yaml`, which is beside this page.
{% for name, heading in pictures.items() %}
{{ heading }}

![{{ name.split(".")[0] }}]({{ name }})
{% endfor %}{% if texts %}
Samples are in [samples.txt](samples.txt).
{% endif %}{% if sounds %}
## Samples
{% for name in sounds %}
[{{ name }}]({{ name }})
{% endfor %}{% endif %}
"""
    + LOADING
    + """
{{ task.usage(data) }}

## Limits

- Trained on the data above and nothing else; the figures say nothing about other data.
{% if positions %}- At most {{ "{:,}".format(positions) }} positions.
{% endif %}{% for note in recipe.notes %}- {{ note }}
{% endfor %}"""
)

FOLDER_TEMPLATE = (
    """---
{{ card_data }}
---

# {{ name }}

A {{ system }}{% if papers %} ({{ papers }}){% endif %} of {{ "{:,}".format(parameters) }} parameters, class
`{{ architecture }}`. No figures came with it.

"""
    + LOADING
)


def model_card(recipe: Recipe, task: Task, data: LoadedData, metrics: dict[str, Any], folder: str | Path) -> ModelCard:
    """The card of a finished run whose other files are in `folder`."""
    folder, model_type = Path(folder), recipe.model["model_type"]
    name = f"{model_type}-{Path(recipe.name).stem}"
    system, arxiv = system_facts(model_type)
    pipelines = PICTURE_PIPELINES if makes_pictures(data.processor) else PIPELINES
    pipeline = pipelines.get(task.auto_class.__name__)
    result = EvalResult(
        task_type=pipeline or "other",
        dataset_type=recipe.data.get("dataset", recipe.data["source"]),
        dataset_name=data.description,
        metric_type=task.metric,
        metric_name=task.metric_title,
        metric_value=metrics[task.metric],
    )
    card = ModelCard.from_template(
        ModelCardData(
            **_metadata(model_type, arxiv, pipeline),
            datasets=[recipe.data["dataset"]] if _is_hub_name(recipe.data.get("dataset")) else None,
            model_name=name,
            eval_results=[result],
        ),
        template_str=RUN_TEMPLATE,
        **{"name": name, "recipe": recipe, "task": task, "data": data, "metrics": metrics, "system": system},
        papers=_links(arxiv),
        pictures={name: heading for name, heading in PICTURES.items() if (folder / name).exists()},
        texts=(folder / "samples.txt").exists(),
        sounds=sorted(path.name for path in folder.glob("samples-*.wav")),
        auto_class=task.auto_class.__name__,
        place=THIS_FOLDER,
        with_code=True,
        positions=_read_json(folder / "config.json").get("max_position_embeddings"),
    )
    return _without_html(card)


def folder_card(folder: str | Path, with_code: bool) -> ModelCard:
    """The card of a saved model that no recipe came with: what its config and its weights say."""
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    system, arxiv = system_facts(config["model_type"])
    architecture = config["architectures"][0]
    auto_class = auto_class_of(config["model_type"], architecture)
    pipelines = PICTURE_PIPELINES if (folder / "preprocessor_config.json").exists() else PIPELINES
    pipeline = pipelines.get(auto_class)
    card = ModelCard.from_template(
        ModelCardData(**_metadata(config["model_type"], arxiv, pipeline)),
        template_str=FOLDER_TEMPLATE,
        **{"name": folder.resolve().name, "system": system, "architecture": architecture, "auto_class": auto_class},
        papers=_links(arxiv),
        parameters=sum(_num_values(path) for path in folder.glob("*.safetensors")),
        place=THIS_FOLDER,
        with_code=with_code,
    )
    return _without_html(card)


def _without_html(card: ModelCard) -> ModelCard:
    """Titles, notes and names are anybody's text: what begins a tag in them is shown and does nothing.

    Our templates hold no tags themselves; sounds, which Markdown cannot play, get theirs afterwards.
    """
    card.text = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", card.text)
    card.text = re.sub(r"^\[(samples-\d+\.wav)\]\(\1\)$", r'<audio controls src="\1"></audio>', card.text, flags=re.M)
    return card


def system_facts(model_type: str) -> tuple[str, list[str]]:
    """A system's title and the arXiv numbers of its papers, as the head of its modeling file has them."""
    if model_type not in {system.name for system in SYSTEMS}:
        return model_type, []
    text = import_module(f".modeling.modeling_{model_type}", __package__).__doc__
    return text.partition(":")[0], list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", text)))


def auto_class_of(model_type: str, architecture: str) -> str:
    """Name of the Auto class that loads an architecture; AutoModel where none is known."""
    for system in SYSTEMS:
        for auto_class, suffix in system.heads.items():
            if system.name == model_type and system.prefix + suffix == architecture:
                return auto_class.__name__
    return "AutoModel"


def _metadata(model_type: str, arxiv: list[str], pipeline: str | None) -> dict[str, Any]:
    tags = ["hf-tfamily", model_type, *(f"arxiv:{number}" for number in arxiv)]
    return {"library_name": "transformers", "pipeline_tag": pipeline, "tags": tags}


def _links(arxiv: list[str]) -> str:
    return ", ".join(f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in arxiv)


def _is_hub_name(dataset: str | None) -> bool:
    """Hub data sets have names; a local folder is nobody else's."""
    return dataset is not None and not Path(dataset).exists()


def _num_values(path: Path) -> int:
    with safe_open(path, framework="pt") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
