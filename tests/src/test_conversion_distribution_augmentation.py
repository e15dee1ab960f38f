"""Checkpoints laid out as openai/distribution_augmentation writes them, made here: logits are those of its train.py,
re-stated in loops. The published files were never at hand."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_tfamily  # noqa: F401
from hf_tfamily.conversion import convert

VALUES, SHAPE, WIDTH, HEADS, LAYERS = 16, (2, 3, 2), 12, 2, 4
LENGTH = math.prod(SHAPE)
HYPERPARAMETERS = {"n_head": HEADS, "attention_layers": "bT,b,b,a", "local_attn_ctx": 3}


def variables(starts=None, qk_width=6, ffn=20):
    """Names and shapes as TensorFlow saves them; `starts` are those of changes, one of pictures as they are if None."""
    generator = np.random.default_rng(0)
    shapes = {"we": (VALUES, WIDTH), "final_norm/g": (WIDTH,), "final_norm/b": (WIDTH,)}
    shapes |= {f"pos_emb_{axis}": (size, WIDTH) for axis, size in enumerate(SHAPE)}
    shapes |= {"gen_logits/logits_proj": (WIDTH, VALUES)}
    shapes |= {f"sos_token/{name}": (count, WIDTH) for name, count in (starts or {}).items()}
    if starts is None:
        shapes["sos_token/sos"] = (1, 1, WIDTH)
    for layer in range(LAYERS):
        linear = {"q_proj": (WIDTH, qk_width), "k_proj": (WIDTH, qk_width), "v_proj": (WIDTH, WIDTH)}
        linear |= {"post_proj": (WIDTH, WIDTH), "mlp_proj1": (WIDTH, ffn), "mlp_proj2": (ffn, WIDTH)}
        for name, shape in linear.items():
            shapes |= {f"h{layer}/{name}/w": shape, f"h{layer}/{name}/b": shape[1:]}
        shapes |= {f"h{layer}/{name}/{leaf}": (WIDTH,) for name in ("attn_input", "mlp") for leaf in "gb"}
    return {f"model/{name}": generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def checkpoint(folder, weights, averages=None, **changes):
    """With the counters and the optimizer's variables that their files hold beside the weights."""
    folder.mkdir()
    config = {"model_type": "distribution_augmentation", **HYPERPARAMETERS, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    saved = {f"{name}:0": array for name, array in weights.items()}
    saved |= {f"{name}/Adam:0": np.zeros(array.shape, np.float16) for name, array in weights.items()}
    saved |= {f"{name}/Adam_1/:0": np.zeros(array.shape, np.float16) for name, array in weights.items()}
    saved |= {f"{name}/Ema/ema:0": array for name, array in (averages or {}).items()}
    counters = {"global_step:0": np.int64(7), "curr_loss_scale:0": np.float32(2), "adam_beta/beta1_power:0": 0.9}
    np.savez(folder / "model.npz", **saved, **counters)
    return folder


def layer_norm(x, weights, name, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * weights[f"{name}/g"] + weights[f"{name}/b"]


def seen(mode, query, key):
    context = HYPERPARAMETERS["local_attn_ctx"]
    return {"a": True, "b": query - key < context, "bT": (query - key) % context == 0}[mode]


def attend(q, k, v, mode):
    """One head: [T, D] each."""
    out = np.zeros_like(v)
    for query in range(len(q)):
        keys = [key for key in range(query + 1) if seen(mode, query, key)]
        scores = np.array([q[query] @ k[key] / math.sqrt(q.shape[1]) for key in keys])
        shares = np.exp(scores - scores.max())
        out[query] = (shares / shares.sum()) @ v[keys]
    return out


def reference_logits(weights, picture, start):
    """[N, values] in float64, of N values of a picture, each from those before it."""
    weights = {name.removeprefix("model/"): array.astype(np.float64) for name, array in weights.items()}
    h = [weights["we"][value] for value in picture]
    for place, coordinates in enumerate(itertools.product(*map(range, SHAPE))):
        h[place] = h[place] + sum(weights[f"pos_emb_{axis}"][i] for axis, i in enumerate(coordinates))
    h = np.stack([start, *h[:-1]])
    modes = HYPERPARAMETERS["attention_layers"].split(",")
    for layer in range(LAYERS):

        def linear(name, x, block=f"h{layer}"):
            return x @ weights[f"{block}/{name}/w"] + weights[f"{block}/{name}/b"]

        x = layer_norm(h, weights, f"h{layer}/attn_input", 1e-5)
        q, k, v = (np.split(linear(f"{of}_proj", x), HEADS, axis=1) for of in "qkv")
        heads = [attend(*parts, modes[layer % len(modes)]) for parts in zip(q, k, v)]
        h = h + linear("post_proj", np.concatenate(heads, axis=1))
        m = linear("mlp_proj1", layer_norm(h, weights, f"h{layer}/mlp", 1e-5))
        h = h + linear("mlp_proj2", m / (1 + np.exp(-1.702 * m)))
    return layer_norm(h, weights, "final_norm", 1e-6) @ weights["gen_logits/logits_proj"]


def our_logits(folder, picture, start_id, implementation="block_sparse"):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval().double()
    ids = torch.tensor([[start_id, *picture[:-1]]])
    with torch.no_grad():
        return model(ids).logits[0].numpy()


@pytest.fixture
def picture():
    return np.random.default_rng(3).integers(0, VALUES, LENGTH)


@pytest.mark.parametrize("implementation", ["eager", "block_sparse"])
def test_logits_are_those_of_their_code(implementation, picture, tmp_path):
    weights = variables()
    result = convert(checkpoint(tmp_path / "theirs", weights), tmp_path / "ours")
    assert (result.model_type, result.fit.missing, result.fit.left_over) == ("sparse_transformer", [], [])
    expected = reference_logits(weights, picture, weights["model/sos_token/sos"][0, 0].astype(np.float64))
    found = our_logits(tmp_path / "ours", picture, VALUES, implementation)
    assert found.shape == (LENGTH, VALUES)
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())


def test_averages_are_taken_where_there_are_some(picture, tmp_path):
    averages = variables()
    last = {name: array + 1 for name, array in averages.items()}
    convert(checkpoint(tmp_path / "theirs", last, averages), tmp_path / "ours")
    expected = reference_logits(averages, picture, averages["model/sos_token/sos"][0, 0].astype(np.float64))
    np.testing.assert_allclose(our_logits(tmp_path / "ours", picture, VALUES), expected, atol=1e-4)


def test_a_start_token_for_each_combination(picture, tmp_path):
    weights = variables(starts={"sos_rot": 4, "sos_tr": 2})
    convert(checkpoint(tmp_path / "theirs", weights), tmp_path / "ours")
    for number, (rotation, transposed) in enumerate(itertools.product(range(4), range(2))):
        start = weights["model/sos_token/sos_rot"][rotation] + weights["model/sos_token/sos_tr"][transposed]
        expected = reference_logits(weights, picture, start.astype(np.float64))
        found = our_logits(tmp_path / "ours", picture, VALUES + number)
        np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())


def test_it_draws_values_alone(tmp_path):
    convert(checkpoint(tmp_path / "theirs", variables()), tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    how = {"max_length": 1 + LENGTH, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    drawn = model.generate(torch.full((8, 1), VALUES), **how)
    assert drawn.shape == (8, 1 + LENGTH)
    assert drawn[:, 1:].max() < VALUES


def test_what_is_not_what_it_says_is_refused(tmp_path):
    good = variables()

    def without(*names):
        return {name: array for name, array in good.items() if not name.startswith(tuple(names))}

    cases = [
        (good, {"attention_layers": "c,b"}, "attention_layers has c; what can be converted is a, b, bT"),
        (good, {"attention_layers": "b", "local_attn_ctx": None}, "has to say local_attn_ctx"),
        (good, {"n_head": 5}, "model/h0/q_proj/w is 6 wide, which n_head=5 does not divide"),
        (without("model/sos_token"), {}, "There is no start token"),
        (without("model/pos_emb"), {}, "no embeddings of positions"),
        (without("model/h1/mlp_proj1"), {}, "Missing: model.layers.1.mlp.up_proj.bias, model.layers.1.mlp.up_proj.w"),
        ({**good, "model/h0/extra/w": good["model/we"]}, {}, "Left over: h0/extra/w"),
        ({**good, "model/h0/mlp_proj2/w": np.zeros((4, 4))}, {}, "Of another shape: model.layers.0.mlp.down_proj"),
    ]
    for number, (weights, changes, message) in enumerate(cases):
        folder = checkpoint(tmp_path / str(number), weights, **changes)
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "ours")
    folder = checkpoint(tmp_path / "silent", good)
    (folder / "config.json").write_text('{"model_type": "distribution_augmentation", "n_head": 2}')
    with pytest.raises(ValueError, match="has to say attention_layers"):
        convert(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="Nothing to check against"):
        convert(checkpoint(tmp_path / "checked", good), tmp_path / "ours", check=True)


def test_pickles_inside_are_not_read(tmp_path):
    folder = checkpoint(tmp_path / "theirs", variables())
    np.savez(folder / "model.npz", **{"model/we:0": np.array([{"a": "pickle"}], dtype=object)})
    with pytest.raises(ValueError, match=r"model\.npz does not hold weights"):
        convert(folder, tmp_path / "ours")
