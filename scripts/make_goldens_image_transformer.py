"""Makes tests/goldens/image_transformer: what the authors' code, tensor2tensor, computes.

It needs an environment of its own:

    python3.11 -m venv t2t && t2t/bin/pip install tensorflow-cpu==2.21 safetensors
    t2t/bin/pip install --no-deps tensor2tensor==1.15.7
    t2t/bin/python scripts/make_goldens_image_transformer.py

A file for each kind of attention holds query, key and value ([1, 2, length, 4] or [1, 2, rows, columns, 4]; that code
does not scale scores), the output, a gradient of the output, and those of query, key and value that follow from it.
discretized_logistics holds parameters [1, 2, 3, 100] of pixels, their values as 0 to 255, and their cost in nats.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "goldens" / "image_transformer"
# What tensor2tensor imports beside TensorFlow; nothing of it is used here.
UNUSED = {"gin", "gym", "mesh_tensorflow", "sympy", "tensorflow_addons", "tensorflow_probability", "tf_slim", "tqdm"}
HEADS, HEAD_DIM = 2, 4
# name: (function of tensor2tensor, its arguments, lengths of the axes between heads and head_dim)
ATTENTIONS = {
    "masked_1d": ("masked_local_attention_1d", {"block_length": 5}, (19,)),
    "masked_2d": ("masked_local_attention_2d", {"query_shape": (2, 3), "memory_flange": (1, 2)}, (6, 9)),
    # This one has a flange below the block as well; in a picture as high as a block nothing lies there.
    "local_2d": ("local_attention_2d", {"query_shape": (2, 3), "memory_flange": (2, 2)}, (2, 9)),
}


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports what is not installed as an object that answers everything."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__name__, module.__spec__, module.__path__ = spec.name, spec, []
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(Unused())
import tensorflow as tf  # noqa: E402
from tensor2tensor.layers import common_attention, common_layers  # noqa: E402


def evaluate(build, *arrays: np.ndarray) -> list[np.ndarray]:
    """The values of the tensors that `build` makes of the arrays, in a graph as TensorFlow 1 has it."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        return session.run(build(*map(tf.constant, arrays)))


def make_attention(name: str, random: np.random.Generator) -> None:
    function, arguments, lengths = ATTENTIONS[name]
    names = ("query", "key", "value", "grad_output")
    arrays = [random.standard_normal((1, HEADS, *lengths, HEAD_DIM), np.float32) for _ in names]

    def build(query, key, value, grad_output):
        output = getattr(common_attention, function)(query, key, value, **arguments)
        return [output, *tf.gradients(output, [query, key, value], grad_output)]

    made = dict(zip(("output", "grad_query", "grad_key", "grad_value"), evaluate(build, *arrays)))
    save(name, dict(zip(names, arrays)) | made)


def make_discretized_logistics(random: np.random.Generator, mixtures: int = 10) -> None:
    """In float64, and with scales at which no interval is so improbable that tensor2tensor goes over to a density."""
    weights, means, scales, coefficients = (
        random.normal(mean, deviation, (1, 2, 3, width * mixtures))
        for mean, deviation, width in ((0, 1, 1), (0, 0.3, 3), (-1, 0.2, 3), (0, 0.5, 3))
    )
    parameters = np.concatenate([weights, means, scales, coefficients], axis=-1)
    values = random.integers(0, 256, (1, 2, 3, 3))
    values[0, 0, 0], values[0, 0, 1] = (0, 255, 128), (255, 0, 0)

    def build(parameters, values):
        return [common_layers.discretized_mix_logistic_loss(parameters, values * (2 / 255) - 1)]

    (nats,) = evaluate(build, parameters, values.astype(np.float64))
    save("discretized_logistics", {"parameters": parameters, "values": values, "nats": nats})


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    save_file(contiguous, FOLDER / f"{name}.safetensors", metadata={"made_with": "tensor2tensor 1.15.7"})


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for name in ATTENTIONS:
        make_attention(name, generator)
    make_discretized_logistics(generator)
