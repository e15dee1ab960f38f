"""What a datastore of its own training text is worth to a language model."""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from .. import knn
from ..data import load_data
from ..reproduction import Claim, Figures, Workspace, compare

ALONE, NEIGHBOURS = "the model alone", "with its neighbours"
STORED, READ = 300_000, 20_000  # bytes


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    folder = workspace.train("rope_decoder/bible", ["data.eval_limit=65536"], seed)
    model, text = AutoModelForCausalLM.from_pretrained(folder).eval(), load_data({"source": "bible_stream"})
    stored, read = (400, 200) if workspace.quick else (STORED, READ)
    with tempfile.TemporaryDirectory() as home:
        store = knn.build_datastore(model, text.train[:stored], Path(home) / "store", progress=True)
        found = knn.evaluate(model, store, text.eval[:read], k=min(256, len(store)), progress=True)
    bits = {ALONE: found["bits_per_token"], NEIGHBOURS: found["knn_bits_per_token"]}
    return {"bits": bits[variant], "lambda": {ALONE: 0.0, NEIGHBOURS: found["lmbda"]}[variant]}


CLAIM = Claim(
    system="kNN-LM",
    paper="Khandelwal et al. 2019, arXiv:1911.00172, section 4",
    statement="neighbours in its own training text lower a model's perplexity without further training",
    papers_figure="WikiText-103: perplexity 18.65 alone, 16.12 with neighbours",
    experiment=f"The recipe `rope_decoder/bible`; a store of the first {STORED:,} bytes of its training text, the "
    f"share of 256 neighbours tuned on the first half of {READ:,} held-out bytes and measured on the second.",
    criterion="with every seed the neighbours lower the bits per byte below the model's alone with any.",
    variants=(ALONE, NEIGHBOURS),
    figures={"bits": "held-out bits per byte", "lambda": "share of the neighbours"},
    measure=measure,
    judge=lambda results: compare(results, "bits", NEIGHBOURS, ALONE),
    needs=("faiss",),
)
