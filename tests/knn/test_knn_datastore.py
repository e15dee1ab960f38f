"""A datastore is what the loops of the reference make of a text; it survives being cut off, and refuses strangers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_tfamily import knn
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.knn.states import StateRecorder, key_module
from hf_tfamily.knn.windows import windows_of
from hf_tfamily.run_errors import RunError
from tests.knn.knn_models import CONFIGS, MAMBA, OURS, text, tiny
from tests.reference import knn_lm

pytest.importorskip("faiss")
ROOT = Path(__file__).parents[2]


def states_of(model, keys="ffn_input"):
    """What the reference asks: ids -> the state at each, read by themselves."""

    def states(ids):
        with StateRecorder(model, keys) as recorder, torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
            return recorder.states(1)[0].tolist()

    return states


@pytest.mark.parametrize("keys", ["ffn_input", "final"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "sparse_transformer", "rope_decoder"])
def test_entries_are_those_of_the_reference(name, keys, tmp_path):
    model, documents = tiny(name), [text(50), text(7, seed=2), text(1), text(23, seed=3)]
    options = {"window": 12, "context": 5, "batch_size": 3, "dtype": "float32"}
    store = knn.build_datastore(model, documents, tmp_path / "store", keys=keys, **options)
    expected, followers = knn_lm.datastore(states_of(model, keys), [list(map(int, d)) for d in documents], 12, 5)
    np.testing.assert_allclose(store.keys, np.array(expected), rtol=1e-4, atol=1e-5)
    assert store.values.tolist() == followers
    assert len(store) == 49 + 6 + 22


def test_each_prediction_is_made_once_with_its_context():
    documents = [text(100), text(2), text(31)]
    seen = []
    for window in windows_of(documents, 10, 4):
        for position in range(window.first, window.length):
            seen.append((window.document, window.start + position + 1))
            assert position >= 4 or window.start == 0
        assert window.length == min(10, len(documents[window.document]) - 1)
    assert seen == [(number, place) for number, size in enumerate((100, 2, 31)) for place in range(1, size)]


@pytest.mark.parametrize("name", [*CONFIGS, *OURS])
def test_any_causal_model_has_a_key(name, tmp_path):
    model = tiny(name)
    assert key_module(model, "ffn_input")[0].rpartition(".")[0].endswith(".1")  # of two layers
    store = knn.build_datastore(model, text(40), tmp_path / "store", window=16, context=8)
    assert store.keys.shape == (39, 32)
    assert store.keys.dtype == np.float16
    figures = knn.evaluate(model, store, text(30, seed=9), k=5, lmbda=0.3, temperature=10.0)
    assert np.isfinite(figures["knn_perplexity"])


def test_a_key_that_cannot_be_found_is_refused_by_name(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(MAMBA)
    with pytest.raises(ValueError, match=r"MambaForCausalLM has none of the names .*mixer.*keys=\"final\""):
        key_module(model, "ffn_input")
    assert len(knn.build_datastore(model, text(20), tmp_path / "final", keys="final", window=8, context=4)) == 19
    named = key_module(model, "backbone.layers.1.mixer")
    assert named[0] == "backbone.layers.1.mixer"
    with pytest.raises(ValueError, match="name of a module of MambaForCausalLM, got 'mlp'"):
        key_module(model, "mlp")


def test_a_memory_is_carried_through_a_window(tmp_path):
    """In segments of 16, the memory's length: what the second one sees is beyond it."""
    model, ids = tiny("transformer_xl"), text(49)
    store = knn.build_datastore(model, ids, tmp_path / "store", window=48, context=0, dtype="float32")
    with StateRecorder(model) as recorder, torch.no_grad():
        memory, found = None, []
        for segment in torch.tensor(ids[None, :48]).split(16, dim=1):
            memory = model(segment, past_key_values=memory, use_cache=True).past_key_values
            found.append(recorder.states(1)[0])
    np.testing.assert_allclose(store.keys, torch.cat(found), rtol=1e-4, atol=1e-5)


def test_chunks_of_the_network_are_put_together(tmp_path):
    model, chunked = tiny("rope_decoder"), tiny("rope_decoder")
    for block in chunked.model.layers:
        block.chunk_size = 5
    stores = [
        knn.build_datastore(each, text(30), tmp_path / str(i), window=12, context=4)
        for i, each in enumerate((model, chunked))
    ]
    np.testing.assert_allclose(stores[0].keys, stores[1].keys, rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Being cut off


class Killed(BaseException):
    pass


def cut_off(model, folder, after, **options):
    """A build that dies in its forward pass number `after`."""
    count = 0

    def die(*_):
        nonlocal count
        count += 1
        if count > after:
            raise Killed

    hook = model.register_forward_pre_hook(die)
    try:
        with pytest.raises(Killed):
            knn.build_datastore(model, text(100), folder, window=10, context=4, batch_size=2, **options)
    finally:
        hook.remove()


def test_a_store_that_was_cut_off_is_gone_on_with(tmp_path):
    model, options = tiny("llama"), {"window": 10, "context": 4}
    whole = knn.build_datastore(model, text(100), tmp_path / "whole", batch_size=2, **options)
    folder = tmp_path / "store"
    cut_off(model, folder, after=4)
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"half-written: \d+ of 99 entries.*--resume"):
        knn.Datastore(folder)
    with pytest.raises(RunError, match="begun and not finished; go on with --resume"):
        knn.build_datastore(model, text(100), folder, **options)
    with pytest.raises(RunError, match="window: 10 and now 9"):
        knn.build_datastore(model, text(100), folder, window=9, context=4, resume=True)
    with pytest.raises(RunError, match="text_sha256"):
        knn.build_datastore(model, text(100, seed=5), folder, resume=True, **options)
    # What was being written when it died is whatever it is.
    partial = tmp_path / "store.partial"
    written = json.loads((partial / "store.json").read_text())["written"]
    assert 0 < written < 99
    keys = np.load(partial / "keys.npy", mmap_mode="r+")
    keys[written:] = 7.0
    keys.flush()
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = knn.build_datastore(model, text(100), folder, batch_size=3, resume=True, **options)
    hook.remove()
    assert len(passes) < 6
    np.testing.assert_allclose(resumed.keys, whole.keys, rtol=2e-3, atol=2e-3)
    assert resumed.values.tolist() == whole.values.tolist()
    assert not partial.exists()


def test_a_finished_store_is_replaced_only_if_asked(tmp_path):
    model, folder = tiny("llama"), tmp_path / "store"
    knn.build_datastore(model, text(30), folder)
    with pytest.raises(RunError, match=r"exists already.*--overwrite"):
        knn.build_datastore(model, text(30), folder)
    assert len(knn.build_datastore(model, text(40), folder, overwrite=True)) == 39
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(RunError, match=r"exists already; choose another folder"):
        knn.build_datastore(model, text(30), other, overwrite=True)


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    said = []
    with pytest.raises(RunError, match=r"needs 1,972 bytes more, and 100 are free"):
        knn.build_datastore(tiny("llama"), text(30), tmp_path / "store", say=said.append)
    assert "29 entries of 68 bytes (a float16 key of width 32, a token): 1,972 bytes" in said[0]


def test_cut_files_are_refused_by_name(tmp_path):
    folder = tmp_path / "store"
    knn.build_datastore(tiny("llama"), text(30), folder)
    os.truncate(folder / "keys.npy", 500)
    with pytest.raises(ValueError, match=r"keys\.npy cannot be read, or is cut"):
        knn.Datastore(folder)
    with pytest.raises(ValueError, match=r"is no datastore: it has no store\.json"):
        knn.Datastore(tmp_path / "none")


KILLED = """
import sys
from hf_tfamily import knn
from tests.knn.knn_models import text, tiny
model = tiny("llama")
count = 0
def say(*_):
    global count
    count += 1
    print(count, flush=True)
    if count == 6 and sys.argv[2] == "wait":
        import time; time.sleep(60)
model.register_forward_pre_hook(say)
knn.build_datastore(model, text(400), sys.argv[1], window=10, context=4, batch_size=2, resume=sys.argv[2] != "wait")
"""


@pytest.mark.slow
def test_kill_9(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*words, "wait"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline().strip() not in ("6", ""):
            pass
        process.send_signal(signal.SIGKILL)
    subprocess.run([*words, "go on"], cwd=ROOT, env=environment, check=True, timeout=100, capture_output=True)
    whole = knn.build_datastore(tiny("llama"), text(400), tmp_path / "whole", window=10, context=4, batch_size=2)
    resumed = knn.Datastore(tmp_path / "store")
    np.testing.assert_allclose(resumed.keys, whole.keys, rtol=2e-3, atol=2e-3)
    assert resumed.values.tolist() == whole.values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Strangers and bad input


def test_another_model_or_tokenizer_is_refused_by_name(tmp_path):
    model, folder = tiny("llama"), tmp_path / "store"
    store = knn.build_datastore(model, text(30), folder, byte_tokenizer())
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    store.check(again, byte_tokenizer())
    store.check(again)
    with pytest.raises(ValueError, match=r"another model: LlamaForCausalLM .*, and this is GPT2LMHeadModel"):
        store.check(tiny("gpt2"))
    with torch.no_grad():
        again.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"another model: LlamaForCausalLM"):
        store.check(again)
    with pytest.raises(ValueError, match=r"another model: .*float32.*and this is .*bfloat16"):
        store.check(tiny("llama").bfloat16())
    with pytest.raises(ValueError, match=r"another tokenizer: .*and this is"):
        store.check(model, byte_tokenizer(alphabet=range(100)))


@pytest.mark.parametrize("name", ["gpt2", *OURS])
def test_a_saved_model_is_the_same(name, tmp_path):
    from hf_tfamily.knn.fingerprints import model_fingerprint

    model = tiny(name)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == model_fingerprint(model)


def test_bad_input_is_refused(tmp_path):
    model = tiny("gpt2")
    for tokens, options, message in (
        ([], {}, "text is empty"),
        ([5], {}, "text is empty"),
        ([1, 96], {}, "id 96, and the model knows 0 to 95"),
        ([1, -1], {}, "id -1"),
        ([1.5, 2.5], {}, "whole numbers"),
        (text(30), {"window": 65}, "at most the model's 64 positions"),
        (text(30), {"window": 8, "context": 8}, "context must be from 0 to window - 1"),
        (text(30), {"dtype": "int8"}, "dtype must be one of"),
        (text(30), {"index": "hnsw"}, 'index must be "auto"'),
        (text(30), {"index": "ivfpq"}, "needs 1,024 keys, got 29"),
    ):
        with pytest.raises(ValueError, match=message):
            knn.build_datastore(model, tokens, tmp_path / "store", **options)
    assert not list(tmp_path.glob("store*"))


def test_states_that_are_not_finite_are_refused(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"beyond what float16 holds.*--dtype float32"):
        knn.build_datastore(model, text(30), tmp_path / "large")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        knn.build_datastore(model, text(30), tmp_path / "nan")
