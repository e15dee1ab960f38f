"""`generate()` with neighbours: greedy, sampling, beams, batches padded on the left; what it cannot do it refuses."""

import pytest
import torch

from hf_tfamily import knn
from hf_tfamily.knn.states import StateRecorder
from tests.knn.knn_models import text, tiny

pytest.importorskip("faiss")
NEW = 6
OPTIONS = {"k": 5, "lmbda": 0.7, "temperature": 5.0}


@pytest.fixture(params=["llama", "gpt2", "sparse_transformer", "rope_decoder", "transformer_xl"])
def pair(request, tmp_path):
    model = tiny(request.param)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model, knn.build_datastore(model, text(60), tmp_path / "store", window=30, context=15)


def distribution(model, store, ids):
    """[B, V] log-probabilities of the next token, from a forward pass of whole rows."""
    with StateRecorder(model) as recorder, torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        queries = recorder.states(len(ids))[:, -1]
    found = knn.knn_log_distribution(*store.search(queries, OPTIONS["k"]), logits.shape[-1], OPTIONS["temperature"])
    return knn.interpolate(found, logits.log_softmax(-1), OPTIONS["lmbda"])


def prompt(rows=3, length=7):
    return torch.from_numpy(text(rows * length, seed=6)).view(rows, length)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_one_token_after_the_other(pair, use_cache):
    model, store = pair
    expected = prompt()
    for _ in range(NEW):
        expected = torch.cat([expected, distribution(model, store, expected).argmax(-1)[:, None]], dim=1)
    with knn.KNNLogitsProcessor(model, store, **OPTIONS) as memory:
        arguments = {"max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache, "logits_processor": [memory]}
        found = model.generate(prompt(), **arguments)
        again = model.generate(prompt(), **arguments)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    alone = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(alone, expected)


def test_rows_padded_on_the_left_go_on_as_alone(pair):
    model, store = pair
    rows = [prompt()[0:1], prompt()[1:2, :4]]
    padded = torch.zeros(2, 7, dtype=torch.long)
    padded[0], padded[1, 3:] = rows[0][0], rows[1][0]
    with knn.KNNLogitsProcessor(model, store, **OPTIONS) as memory:
        arguments = {"max_new_tokens": NEW, "do_sample": False, "logits_processor": [memory]}
        together = model.generate(padded, attention_mask=(padded != 0).long(), **arguments)
        apart = [model.generate(row, attention_mask=torch.ones_like(row), **arguments) for row in rows]
    for row, alone in zip(together, apart):
        assert row[7:].tolist() == alone[0, -NEW:].tolist()


def test_beams_find_a_row_that_is_as_likely_as_they_say(pair):
    model, store = pair
    with knn.KNNLogitsProcessor(model, store, **OPTIONS) as memory:
        arguments = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
        found = model.generate(prompt(2), max_new_tokens=NEW, do_sample=False, logits_processor=[memory], **arguments)
    for row, score in zip(found.sequences, found.sequences_scores):
        total = 0.0
        for place in range(7, 7 + NEW):
            total += float(distribution(model, store, row[None, :place])[0, row[place]])
        assert total == pytest.approx(float(score), abs=1e-3)


def test_sampling_draws_from_the_mixture(pair):
    model, store = pair
    one = prompt(1)
    with knn.KNNLogitsProcessor(model, store, **OPTIONS) as memory:
        arguments = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "num_return_sequences": 4000}
        drawn = model.generate(one, logits_processor=[memory], **arguments)[:, -1]
    shares = torch.bincount(drawn, minlength=96).double() / 4000
    assert (shares - distribution(model, store, one)[0].exp()).abs().max() < 0.05


def test_forbidden_tokens_stay_forbidden(pair):
    model, store = pair
    likeliest = int(distribution(model, store, prompt(1)).argmax())
    with knn.KNNLogitsProcessor(model, store, **OPTIONS) as memory:
        arguments = {"max_new_tokens": 1, "do_sample": False, "suppress_tokens": [likeliest]}
        found = model.generate(prompt(1), logits_processor=[memory], **arguments)
    assert int(found[0, -1]) != likeliest


def test_what_cannot_be_told_is_refused(tmp_path):
    model = tiny("llama")
    store = knn.build_datastore(model, text(60), tmp_path / "store")
    memory = knn.KNNLogitsProcessor(model, store, **OPTIONS)
    arguments = {"max_new_tokens": 4, "do_sample": False, "logits_processor": [memory], "eos_token_id": None}
    with pytest.raises(ValueError, match="Generate inside"):
        model.generate(prompt(1), **arguments)
    with memory:
        for option in ({"guidance_scale": 2.0}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("llama")}):
            with pytest.raises(ValueError, match="neither with assisted generation nor with guidance_scale"):
                model.generate(prompt(1).repeat(1, 3), **arguments, **option)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match=r"is no PreTrainedModel.*merge_and_unload"):
        knn.KNNLogitsProcessor(torch.nn.Linear(2, 2), store)
