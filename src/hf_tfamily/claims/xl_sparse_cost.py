"""XLSparse against Transformer-XL where both read as many keys for a token."""

from ..reproduction import Claim, Figures, Finding, Results, Workspace, compare

SEGMENT = 64
OURS, FARTHER = "XLSparse, reach 256", "XLSparse, reach 1,024"
PEER, LONGER = "Transformer-XL, memory 46", "Transformer-XL, memory 128"
PATTERN = "{{type: union, patterns: [{{type: local, window: 64}}, {{type: strided, stride: {stride}}}]}}"
RUNS = {
    OURS: ("xl_sparse/bible", "model.mem_len=256", f"model.attention_patterns={PATTERN.format(stride=16)}"),
    FARTHER: ("xl_sparse/bible", "model.mem_len=1024", f"model.attention_patterns={PATTERN.format(stride=64)}"),
    PEER: ("transformer_xl/bible", "model.mem_len=46"),
    LONGER: ("transformer_xl/bible", "model.mem_len=128"),
}
STRIDES = {OURS: (256, 16), FARTHER: (1024, 64)}
MEMORIES = {PEER: 46, LONGER: 128}


def keys(variant: str) -> float:
    """How many keys a token reads in every layer, on average over a segment, once the memory is full."""
    if variant in MEMORIES:
        return MEMORIES[variant] + (SEGMENT + 1) / 2
    memory, stride = STRIDES[variant]
    far = [sum(1 for distance in range(64, memory + place + 1) if distance % stride == 0) for place in range(SEGMENT)]
    return 64 + sum(far) / SEGMENT


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    recipe, *changes = RUNS[variant]
    metrics = workspace.metrics(recipe, [*changes, "data.eval_limit=65536"], seed)
    return {"bits": metrics["bits_per_byte"], "keys": keys(variant)}


def judge(results: Results) -> Finding:
    best = min((OURS, FARTHER), key=lambda variant: results.mean(variant, "bits"))
    return compare(results, "bits", best, PEER)


CLAIM = Claim(
    system="XLSparse",
    paper="this project; after Dai et al. 2019 (arXiv:1901.02860) and Child et al. 2019 (arXiv:1904.10509)",
    statement="recurrence over sparse attention beats Transformer-XL on long text at an equal number of keys read",
    papers_figure="none",
    experiment="The recipes `xl_sparse/bible` and `transformer_xl/bible`, segments of 64 bytes, 400 steps. XLSparse "
    "sees its last 64 bytes and every 16th of the last 256, or every 64th of the last 1,024; Transformer-XL a memory "
    "of 46, which is as many keys, and for comparison one of 128.",
    criterion="the better of the two XLSparse has fewer bits per byte than the Transformer-XL of as many keys, with "
    "every seed.",
    variants=tuple(RUNS),
    figures={"bits": "held-out bits per byte", "keys": "keys read by a token in a layer"},
    measure=measure,
    judge=judge,
)
