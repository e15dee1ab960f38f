"""The model card of a finished run."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .data import LoadedData
from .recipes import Recipe
from .tasks import Task

TEMPLATE = """---
{{ card_data }}
---

# {{ recipe.name }}

{{ recipe.title }}

- **System:** `{{ recipe.model.model_type }}`{% if recipe.reference %}, {{ recipe.reference }}{% endif %}
- **Data:** {{ data.description }}. Licence of the data: {{ data.licence }}.
- **Parameters:** {{ "{:,}".format(metrics.parameters) }}
{% for note in recipe.notes %}- {{ note }}
{% endfor %}
## Figures

{{ task.summary(metrics) }}, after {{ metrics.steps }} steps in {{ metrics.seconds }} seconds of training.

The recipe is beside this page. `hf-tfamily train recipe.yaml` makes these figures and this folder,
`hf-tfamily evaluate .` computes the held-out figure again.

![loss](loss.png)
{% if pictures %}
![samples](samples.png)
{% endif %}
## Loading

With the package `hf-tfamily` installed:

```python
import hf_tfamily
from transformers import {{ auto_class }}
model = {{ auto_class }}.from_pretrained("path/to/this/folder")
```

Without it; the model's code is in this folder:

```python
from transformers import {{ auto_class }}
model = {{ auto_class }}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

{{ task.usage(data) }}
"""


def model_card(recipe: Recipe, task: Task, data: LoadedData, metrics: dict[str, Any], folder: str | Path) -> ModelCard:
    """What the model is, what it was trained on, its figures, and how to load it."""
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["hf-tfamily", recipe.model["model_type"]]),
        template_str=TEMPLATE,
        recipe=recipe,
        task=task,
        data=data,
        metrics=metrics,
        auto_class=task.auto_class.__name__,
        pictures=(Path(folder) / "samples.png").exists(),
    )
