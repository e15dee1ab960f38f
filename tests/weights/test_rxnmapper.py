"""RXNMapper's ALBERT, which somebody else trained to fill in chemical reactions: one block, twelve times."""

import re

import pytest
import torch
from transformers import AlbertForMaskedLM

from hf_tfamily import Local, set_attention_patterns
from tests.weights.installed import checkpoint_in

pytestmark = pytest.mark.slow

# Reactants >> product, as the package's README writes them.
REACTIONS = (
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12",
)
TOKENS = re.compile(
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9])"
)


@pytest.fixture(scope="module")
def folder():
    return checkpoint_in("rxnmapper")


@pytest.fixture(scope="module")
def vocabulary(folder):
    return {token: number for number, token in enumerate((folder / "vocab.txt").read_text().split("\n"))}


@pytest.fixture(scope="module")
def inputs(vocabulary):
    """Both reactions, the shorter one padded."""
    rows = [["[CLS]", *TOKENS.findall(each), "[SEP]"] for each in REACTIONS]
    assert all("".join(row[1:-1]) == each for row, each in zip(rows, REACTIONS))
    ids = [torch.tensor([vocabulary[token] for token in row]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=vocabulary["[PAD]"])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


def load(folder, implementation):
    how = {"attn_implementation": implementation, "dtype": torch.float32, "weights_only": True}
    return AlbertForMaskedLM.from_pretrained(folder, **how).eval()


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_block_sparse_equals_eager(folder, inputs):
    eager, sparse = load(folder, "eager"), load(folder, "block_sparse")
    config = sparse.config
    assert (config.num_hidden_layers, config.num_hidden_groups) == (12, 1), "one block, twelve times"
    torch.testing.assert_close(logits(sparse, inputs), logits(eager, inputs), atol=1e-3, rtol=1e-4)
    set_attention_patterns(sparse, Local(inputs["input_ids"].shape[1]), attention_dropout=0.0)
    torch.testing.assert_close(logits(sparse, inputs), logits(eager, inputs), atol=1e-3, rtol=1e-4)
    set_attention_patterns(sparse, Local(2), attention_dropout=0.0)
    assert (logits(sparse, inputs) - logits(eager, inputs)).abs().max() > 0.1


def test_it_fills_in_what_is_hidden(folder, inputs, vocabulary):
    """Every fifth token of a product is hidden; the reactants say what it was."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    start = (ids == vocabulary[">>"]).int().argmax(1, keepdim=True)
    places = torch.arange(ids.shape[1])
    hidden = (places > start) & (places % 5 == 0) & (places < mask.sum(1, keepdim=True) - 1)
    ids[hidden] = vocabulary["[MASK]"]
    with torch.inference_mode():
        found = load(folder, "block_sparse")(ids, attention_mask=mask).logits.argmax(-1)
    assert hidden.sum() > 8
    assert (found[hidden] == inputs["input_ids"][hidden]).float().mean() > 0.7
