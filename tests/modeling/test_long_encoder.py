"""Long encoder: equal to the papers' loops, every backend, padding, which tokens are global, and what is refused."""

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from hf_tfamily.auto import register_all
from hf_tfamily.modeling.attention_patterns import Block1D, BlockTable, Local, PerHead, Union
from hf_tfamily.modeling.configuration_long_encoder import BigBirdBlocks, LongEncoderConfig
from hf_tfamily.modeling.modeling_long_encoder import (
    LongEncoder,
    LongEncoderForMaskedLM,
    LongEncoderForQuestionAnswering,
    LongEncoderForSequenceClassification,
    LongEncoderForTokenClassification,
    LongEncoderModel,
)
from tests.reference.long_encoder import long_encoder

register_all()

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "classifier_dropout": 0.0,
}
BACKENDS = ("eager", "sdpa", "flex_attention", "block_sparse")
WINDOWS = [Local(3), PerHead([Local(2), Local(3, dilation=2)])]
BLOCKS = [Union([Block1D(4, 4, 4), BigBirdBlocks(4, 1, heads=4, longest=64, seed=seed)]) for seed in range(2)]
SYSTEMS = {
    "longformer": {"attention_patterns": [pattern.to_dict() for pattern in WINDOWS]},
    "big_bird": {
        "attention_patterns": [pattern.to_dict() for pattern in BLOCKS],
        "global_projections": False,
        "global_tokens": "edges",
        "num_global_tokens": 4,
    },
    "etc": {"attention_patterns": WINDOWS[0].to_dict(), "global_tokens": "first", "num_global_tokens": 3},
}
each_system = pytest.mark.parametrize("system", SYSTEMS)


def encoder(model_class=LongEncoderModel, implementation="block_sparse", **fields):
    torch.manual_seed(0)
    config = LongEncoderConfig(**{**TINY, **fields})
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def ids(*shape):
    torch.manual_seed(1)
    return torch.randint(3, TINY["vocab_size"], shape)


@torch.no_grad()
@each_system
def test_equals_the_papers_loops(system):
    tokens = ids(1, 23)
    marked = {"longformer": {4, 5, 22}, "big_bird": {0, 1, 2, 3, 20, 21, 22}, "etc": {0, 1, 2}}[system]
    given = {}
    if system == "longformer":
        given["global_attention_mask"] = torch.tensor([[int(i in marked) for i in range(23)]])
    model = encoder(**SYSTEMS[system]).double()
    patterns = [pattern.bind((23,)) for pattern in model.patterns]
    expected = long_encoder(model, tokens[0], marked, patterns)
    torch.testing.assert_close(model(tokens, **given).last_hidden_state[0], expected, atol=1e-9, rtol=0)


@each_system
@pytest.mark.parametrize("padded", [False, True])
def test_backends_agree_in_outputs_and_gradients(system, padded):
    tokens, mask = ids(3, 29), torch.ones(3, 29, dtype=torch.long)
    if padded:
        mask[0, :6], mask[1, 20:] = 0, 0
    marked = torch.zeros_like(tokens)
    marked[0, [7, 28]] = marked[2, 3] = 1
    for given in ({}, {"global_attention_mask": marked}):
        found = {}
        for implementation in BACKENDS:
            model = encoder(LongEncoderForTokenClassification, implementation, num_labels=3, **SYSTEMS[system])
            is_flex = implementation == "flex_attention"
            with torch.set_grad_enabled(not is_flex), torch.compiler.set_stance("force_eager"):
                logits = model(tokens, attention_mask=mask, **given).logits[mask.bool()]
            found[implementation] = [logits.detach()]
            if not is_flex:
                (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
                found[implementation] += [p.grad for p in model.parameters() if p.grad is not None]
        for implementation in BACKENDS[1:]:
            for mine, expected in zip(found[implementation], found["eager"]):
                torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4, msg=implementation)


@torch.no_grad()
@each_system
def test_padding_changes_no_token(system):
    model, tokens = encoder(**SYSTEMS[system]), ids(1, 22)
    alone = model(tokens).last_hidden_state
    for left, right in ((5, 0), (0, 9)):
        padded = torch.nn.functional.pad(tokens, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        found = model(padded, attention_mask=mask).last_hidden_state[:, left : left + 22]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_rows_are_documents_where_global_tokens_have_no_projections_of_their_own():
    fields = {**SYSTEMS["etc"], "global_projections": False}
    model, tokens = encoder(**fields), ids(1, 20)
    alone = torch.cat([model(tokens[:, :8])[0], model(tokens[:, 8:])[0]], dim=1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    torch.testing.assert_close(model(tokens, position_ids=positions)[0], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="whose global tokens see whole rows, takes no position_ids of its own"):
        encoder(**SYSTEMS["etc"])(tokens, position_ids=positions)
    with pytest.raises(ValueError, match="looks for the end of a row, takes no position_ids of its own"):
        encoder(**SYSTEMS["big_bird"])(tokens, position_ids=positions)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_class", "marked"),
    [
        (LongEncoderForMaskedLM, []),
        (LongEncoderForTokenClassification, []),
        (LongEncoderForSequenceClassification, [0]),
        (LongEncoderForQuestionAnswering, [0, 1, 2]),
    ],
)
def test_what_is_global_by_task(model_class, marked):
    model, tokens = encoder(model_class, **SYSTEMS["longformer"]), ids(1, 12)
    tokens[0, 3] = tokens[0, 4] = tokens[0, 11] = model.config.sep_token_id
    mask = torch.zeros_like(tokens)
    mask[0, marked] = 1
    torch.testing.assert_close(model(tokens)[0], model(tokens, global_attention_mask=mask)[0], atol=1e-6, rtol=1e-5)
    mask[0, 7] = 1
    assert not torch.allclose(model(tokens)[0], model(tokens, global_attention_mask=mask)[0], atol=1e-4)


def test_answers_are_learned():
    model, tokens = encoder(LongEncoderForQuestionAnswering, **SYSTEMS["etc"]).train(), ids(2, 12)
    start, end = torch.tensor([3, 99]), torch.tensor([5, 8])  # a place outside the row is ignored
    outputs = model(tokens, start_positions=start, end_positions=end)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    first = -outputs.start_logits.log_softmax(-1)[0, 3]
    last = -outputs.end_logits.log_softmax(-1)[[0, 1], end].mean()
    torch.testing.assert_close(outputs.loss, (first + last) / 2)
    assert type(AutoModelForQuestionAnswering.from_config(model.config)) is LongEncoderForQuestionAnswering


def test_without_patterns_it_is_longformers_window():
    config = LongEncoderConfig()
    assert config.attention_patterns == {"type": "local", "window": 257}
    assert LongEncoder is LongEncoderModel


def test_compiles_without_graph_breaks_where_the_number_of_global_tokens_is_known():
    model, tokens = encoder(LongEncoderForMaskedLM, **SYSTEMS["etc"]), ids(2, 14)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_big_birds_blocks_are_no_neighbours_and_no_edges():
    drawn = BigBirdBlocks(4, 2, heads=3, longest=128, seed=1)
    table = drawn.bind((100,))
    assert isinstance(table, BlockTable)
    assert len(table.table) == 3
    for head in table.table:
        for row, numbers in enumerate(head[1:], start=1):
            assert len(numbers) == 2
            assert not set(numbers) & {row - 1, row, row + 1, 0}
    assert table is drawn.bind((57,)), "one draw for all lengths"
    with pytest.raises(ValueError, match=r"bind\(\(tokens,\)\)"):
        drawn.visible(0, 1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_tokens": "all"}, "global_tokens='all' is unknown"),
        ({"num_global_tokens": 0}, "num_global_tokens must be at least 1, got 0"),
        ({"pooler_act": "no"}, "pooler_act='no' is unknown"),
        ({"position_encoding": "alibi"}, "position_encoding='alibi' scores distances, which global_projections=True"),
        (
            {"attention_patterns": {"type": "local", "window": 0}},
            "Local.window must be an integer of at least 1, got 0",
        ),
        (
            {"attention_patterns": {"type": "block_table", "block": 4, "table": [[[0]], [[1]], [[2]]]}},
            "is for 3 heads, which does not divide num_attention_heads=4",
        ),
        ({"attention_patterns": {"type": "block_table", "block": 4, "table": [[[0, 0]]]}}, "lists a block twice"),
        ({"attention_patterns": {"type": "block_table", "block": 4, "table": [[[-1]]]}}, "numbers of blocks from 0 on"),
        (
            {"attention_patterns": {"type": "big_bird_blocks", "block": 4, "count": 1, "heads": 2, "longest": 64}},
            "BigBirdBlocks.heads=2 must be num_attention_heads=4",
        ),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(Exception, match=message):
        LongEncoderConfig(**{**TINY, **fields})


def test_bad_inputs():
    model = encoder(LongEncoderForQuestionAnswering, **SYSTEMS["longformer"])
    with pytest.raises(ValueError, match="input_ids have no sep_token_id=2 in row 0, so that no token is global"):
        model(ids(1, 9))
    with pytest.raises(ValueError, match=r"global_attention_mask must have shape \[1, 9\], got \[1, 8\]"):
        model(ids(1, 9), global_attention_mask=torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"The model has 64 positions \(max_position_embeddings\)"):
        model(ids(1, 65), global_attention_mask=torch.ones(1, 65))
    with pytest.raises(ValueError, match="take a 2-D attention_mask beside global tokens"):
        model(ids(1, 9), attention_mask=torch.ones(1, 1, 9, 9).bool(), global_attention_mask=torch.ones(1, 9))
