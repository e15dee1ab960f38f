"""The model card of a finished run."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .data import LoadedData
from .recipes import Recipe

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

| held-out bits per dimension | uniform guess | steps | seconds of training |
|---|---|---|---|
| {{ bits }} | {{ uniform_bits }} | {{ metrics.steps }} | {{ metrics.seconds }} |

The recipe is beside this page. `hf-tfamily train recipe.yaml` makes these figures and this folder,
`hf-tfamily evaluate .` computes the first figure again.

![loss](loss.png)
{% if pictures %}
![samples](samples.png)
{% endif %}
## Loading

With the package `hf-tfamily` installed:

```python
import hf_tfamily
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without it; the model's code is in this folder:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

Inputs are `[start, x0 ... x(N-2)]`, N = {{ "{:,}".format(data.dims) }} values behind a start token
({{ start_tokens }}); outputs are the logits of `[x0 ... x(N-1)]`.
`model.generate(start_ids)` samples.
"""


def model_card(recipe: Recipe, data: LoadedData, metrics: dict[str, Any]) -> ModelCard:
    """What the model is, what it was trained on, its figures, and how to load it."""
    first, last = data.start_ids[0], data.start_ids[-1]
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["hf-tfamily", recipe.model["model_type"]]),
        template_str=TEMPLATE,
        recipe=recipe,
        data=data,
        metrics=metrics,
        bits=f"{metrics['bits_per_dim']:.4f}",
        uniform_bits=f"{metrics['uniform_bits_per_dim']:.4f}",
        pictures=hasattr(data.processor, "start_tokens"),
        start_tokens=f"id {first}" if first == last else f"ids {first} to {last}, one for each class",
    )
