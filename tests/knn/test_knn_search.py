"""Neighbours and probabilities equal the loops of the reference; the quantized index, its file, and the commands."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_tfamily import knn
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.hub import export
from hf_tfamily.knn.states import StateRecorder
from hf_tfamily_cli import app
from tests.knn.knn_models import text, tiny
from tests.reference import knn_lm

pytest.importorskip("faiss")
V = 96


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    return knn.build_datastore(model, text(120), tmp_path_factory.mktemp("knn") / "store", window=16, context=8)


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (7, 3.0), (119, 20.0)])
def test_probabilities_equal_the_loops(store, k, temperature):
    queries, targets = torch.randn(30, 32), torch.from_numpy(text(30, seed=4))
    tokens, distances = store.search(queries, k)
    found = knn.knn_log_distribution(tokens, distances, V, temperature).exp()
    of_targets = knn.knn_log_probabilities(tokens, distances, targets, temperature).exp()
    keys, values = store.keys.astype(float).tolist(), store.values.tolist()
    p_lm = torch.rand(30, V).softmax(-1)
    mixed = knn.interpolate(found.log(), p_lm.log(), 0.3).exp()
    for row, query in enumerate(queries.tolist()):
        expected = knn_lm.knn_distribution(query, keys, values, V, k, temperature)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(of_targets[row], expected[targets[row]], rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(mixed[row], knn_lm.interpolated(expected, p_lm[row].tolist(), 0.3), rtol=1e-4)
        near = [distance for distance, _ in knn_lm.neighbours(query, keys, k)]
        np.testing.assert_allclose(distances[row], near, rtol=1e-4)


def test_far_neighbours_do_not_underflow():
    tokens, distances = torch.tensor([[3, 4]]), torch.tensor([[1e6, 1e6 + 1.0]])
    found = knn.knn_log_distribution(tokens, distances, 6, 1.0).exp()
    torch.testing.assert_close(found[0, 3:5], torch.tensor([0.0, -1.0]).softmax(0).double())


def test_all_or_nothing_of_lambda():
    log_knn, log_lm = torch.tensor([-1.0, -torch.inf]), torch.tensor([-2.0, -3.0])
    assert knn.interpolate(log_knn, log_lm, 0.0).tolist() == [-2.0, -3.0]
    assert knn.interpolate(log_knn, log_lm, 1.0).tolist() == [-1.0, -torch.inf]


def test_bad_values_are_refused(model, store):
    for options, message in (
        ({"k": 0}, "k must be from 1 to the 119 keys"),
        ({"k": 120}, "k must be from 1 to the 119 keys .*got 120"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"lmbda": 1.1}, "lambda must be from 0"),
        ({"lmbda": -0.1}, "lambda must be from 0"),
        ({"tuned_on": 1.0}, "tuned_on must be a share"),
        ({"tuned_on": 0.001}, "too few to tune on"),
    ):
        with pytest.raises(ValueError, match=message):
            knn.evaluate(model, store, text(30), **options)
        if options.keys() <= {"k", "temperature", "lmbda"}:
            with pytest.raises(ValueError, match=message):
                knn.KNNLogitsProcessor(model, store, **options)
    with pytest.raises(ValueError, match=r"queries must be \[n, 32\]"):
        store.search(torch.randn(2, 31), 1)
    with pytest.raises(ValueError, match="another model"):
        knn.evaluate(tiny("gpt2"), store, text(30))


def test_evaluation_equals_the_loops(model, store):
    ids = text(41, seed=8)
    figures = knn.evaluate(model, store, ids, k=10, temperature=5.0, lmbda=0.4, window=64)
    with StateRecorder(model) as recorder, torch.no_grad():
        p_lm = model(torch.from_numpy(ids[None, :-1])).logits[0].softmax(-1).tolist()
        queries = recorder.states(1)[0].tolist()
    keys, values, nats, alone = store.keys.astype(float).tolist(), store.values.tolist(), 0.0, 0.0
    for query, probabilities, target in zip(queries, p_lm, ids[1:]):
        p_knn = knn_lm.knn_distribution(query, keys, values, V, 10, 5.0)
        nats -= np.log(knn_lm.interpolated(p_knn, probabilities, 0.4)[target])
        alone -= np.log(probabilities[target])
    assert figures["knn_perplexity"] == pytest.approx(np.exp(nats / 40), rel=1e-4)
    assert figures["perplexity"] == pytest.approx(np.exp(alone / 40), rel=1e-4)
    assert (figures["tokens"], figures["tuned_tokens"]) == (40, 0)


def test_a_text_that_was_seen_is_remembered(model, store):
    """Tuned on its first half, the second half of the store's own text is all but known; a strange one is not."""
    seen = knn.evaluate(model, store, text(120))
    assert seen["knn_perplexity"] < 2 < 50 < seen["perplexity"]
    assert seen["lmbda"] > 0.9
    assert (seen["tokens"], seen["tuned_tokens"], seen["k"]) == (60, 59, 119)


def test_a_quantized_index(model, tmp_path):
    """It finds most of the nearest; distances are those of the keys; its file is whole or made again."""
    ids, folder = text(3000), tmp_path / "store"
    knn.build_datastore(model, ids, folder, window=64, context=0, index="ivfpq")
    exact = knn.build_datastore(model, ids, tmp_path / "exact", window=64, context=0)
    store = knn.Datastore(folder)
    assert (store.kind, exact.kind) == ("ivfpq", "flat")
    queries = torch.from_numpy(np.array(exact.keys[::30])).float() + 0.01
    tokens, distances = store.search(queries, 4, nprobe=1000)
    expected, near = exact.search(queries, 4)
    assert (tokens[:, 0] == expected[:, 0]).float().mean() > 0.9
    same = tokens[:, 0] == expected[:, 0]
    torch.testing.assert_close(distances[same, 0], near[same, 0])
    with pytest.raises(ValueError, match="nprobe must be at least 1"):
        store.search(queries, 4, nprobe=0)
    (folder / "index.faiss").write_bytes(b"something else")
    again = knn.Datastore(folder).search(queries, 4, nprobe=1000)
    torch.testing.assert_close(again, (tokens, distances))
    (folder / "index.faiss").unlink()
    torch.testing.assert_close(knn.Datastore(folder).search(queries, 4, nprobe=1000), (tokens, distances))
    few = knn.Datastore(folder).search(queries, 1000, nprobe=1)[1]
    assert few.isinf().any()
    assert few[:, 0].isfinite().all()


def test_keys_are_mapped_and_never_written(store):
    before = (store.folder / "keys.npy").read_bytes()
    opened = knn.Datastore(store.folder)
    assert opened.keys.base is not None
    opened.keys[0] = 3.0
    assert (store.folder / "keys.npy").read_bytes() == before


def test_without_faiss_the_extra_is_named(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=re.escape('pip install "hf-tfamily[knn]"')):
        knn.Datastore(store.folder).search(torch.randn(1, 32), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, re.sub(r"\s+", " ", result.output)

    return run


@pytest.fixture
def folder(tmp_path):
    """A byte-level model and two texts."""
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_model

    export(tiny_model("rope_decoder", AutoModelForCausalLM, vocab_size=257), tmp_path / "model", byte_tokenizer())
    (tmp_path / "seen.txt").write_text("In the beginning was the word. " * 10)
    (tmp_path / "new.txt").write_text("the word was in the beginning, as ever. " * 5)
    (tmp_path / "empty.txt").write_text(" \n")
    return tmp_path


def test_build_evaluate_and_sample(run, folder):
    model, store = folder / "model", folder / "store"
    code, said = run("knn", "build", model, "--text", folder / "seen.txt", "--output", store)
    assert code == 0, said
    assert "309 entries of 68 bytes" in said
    assert json.loads((store / "store.json").read_text())["tokenizer"]["ids"] == 257
    code, said = run("knn", "evaluate", model, "--store", store, "--text", folder / "new.txt")
    assert code == 0, said
    alone, with_them = (float(re.search(rf"{name} ([\d.]+)", said)[1]) for name in ("alone", "neighbours"))
    assert with_them < alone / 2
    assert "tuned on 99 tokens before" in said
    options = ("--k", 8, "--lambda", 0.9, "--tokens", 9, "--prompt", "In the begin", "--prompt", "was")
    # States of an untrained model lie within 0.4 of each other: at a temperature of 1 all 8 count the same, and what
    # follows the one that fits, at a distance of 0, is outvoted ("In the begining").
    code, said = run("knn", "sample", model, "--store", store, *options, "--greedy", "--temperature", 0.01)
    assert code == 0, said
    assert "In the beginning was" in said


def test_what_is_wrong_is_said_in_one_line(run, folder):
    model, store = folder / "model", folder / "store"
    for words, message in (
        (("build", model, "--output", store), "--text FILE, or --data RECIPE"),
        (("build", model, "--output", store, "--text", folder / "empty.txt"), "is empty"),
        (("build", model, "--output", store, "--data", "swin_transformer/emoji"), "no recipe of text"),
        (("evaluate", model, "--store", folder, "--text", folder / "new.txt"), "is no datastore"),
    ):
        code, said = run("knn", *words)
        assert code == 2, said
        assert said.startswith("Error:")
        assert message in said
