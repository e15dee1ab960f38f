"""Time for each token of a text that is evaluated with a long attention: with memory, or with a window read anew.

A vanilla Transformer sees a window before each token by reading the whole window for it. Transformer-XL reads a segment
of new tokens and remembers the rest (Dai et al. 2019, arXiv:1901.02860, section 4.5). The shape is that of the paper's
enwik8 model of 12 layers; weights are random, which changes nothing about the time.
"""

import sys

import torch
from benchmarking import Benchmark, Measure, measure
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.configuration_transformer_xl import TransformerXLConfig
from hf_tfamily.modeling.modeling_rope_decoder import RoPEDecoderForCausalLM
from hf_tfamily.modeling.modeling_transformer_xl import TransformerXLForCausalLM

PAPER = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}  # times, table 9
MUST = {3800: 1000}
SHAPE = {"vocab_size": 204, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
QUICK_SHAPE = {**SHAPE, "hidden_size": 64, "num_hidden_layers": 2}
NOTE = """\
Ours is Transformer-XL with `same_length`: every token sees so many keys, in segments of {segment} new tokens of one
stream. Its first peer is a stock GPT-2 of the same layers and widths, under SDPA, that reads a window of as many tokens
for each token. "Work" says how many times more operations that takes, which would be the ratio if both ran equally
well. The stretch is what Dai et al. 2019 measured on a GPU. The second peer is a RoPE decoder of the same layers and
size that reads the same segments with a rolling key/value cache.
"""


def transformer_xl(shape: dict, attention_length: int) -> TransformerXLForCausalLM:
    """Evaluates as the authors do: same_length, distances clamped at 820."""
    lengths = {"mem_len": attention_length, "same_length": True, "clamp_len": 820}
    return TransformerXLForCausalLM(TransformerXLConfig(**shape, **lengths)).eval()


def rope_decoder(shape: dict, attention_length: int) -> RoPEDecoderForCausalLM:
    """A gated feed-forward layer has three matrices, so they are narrower for the same size."""
    window = {"attention_patterns": {"type": "local", "window": attention_length}}
    narrower = {"intermediate_size": 8 * shape["hidden_size"] // 3}
    return RoPEDecoderForCausalLM(RoPEDecoderConfig(**shape, **narrower, **window)).eval()


def vanilla(shape: dict, attention_length: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(**shape, n_positions=attention_length, bos_token_id=None, eos_token_id=None)
    ).eval()


class Reader:
    """Reads on in a text: each call takes the next segment."""

    def __init__(self, model: PreTrainedModel, past, segment_length: int):
        self.model = model
        self.past = past
        self.ids = torch.randint(0, model.config.vocab_size, (1, segment_length))

    def __call__(self) -> torch.Tensor:
        outputs = self.model(input_ids=self.ids, past_key_values=self.past, use_cache=True)
        self.past = outputs.past_key_values
        return outputs.logits

    def fill(self, tokens: int) -> None:
        """Read until so many tokens are remembered, in long segments."""
        segment, self.ids = self.ids, self.ids.repeat(1, 4)
        for _ in range(-(-tokens // self.ids.shape[1])):
            self()
        self.ids = segment


def work_ratio(shape: dict, attention_length: int, segment_length: int) -> float:
    """How many times more multiplications and additions a window for each token takes than memory.

    The window: every token passes through the weights, and meets half the window twice (scores and values). With
    memory: a token passes through the weights, and meets memory and segment three times (scores of distances too).
    """
    width = shape["hidden_size"]
    weights = 2 * 12 * width**2  # four projections, and two matrices four times as wide
    window = attention_length * (weights + 2 * 2 * width * attention_length / 2)
    return window / (weights + 3 * 2 * width * (attention_length + segment_length))


def memory_is_exact(shape: dict) -> tuple[bool, str]:
    """Segments with memory, or with a rolling cache, give what one pass over the text gives."""
    worst = 0.0
    for build in (transformer_xl, rope_decoder):
        model = build(shape, 64)
        ids = torch.randint(0, shape["vocab_size"], (1, 200))
        past = PatternCache.from_config(model.config) if build is rope_decoder else None
        parts = []
        for segment in ids.split(48, dim=1):
            outputs = model(input_ids=segment, past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            parts.append(outputs.logits)
        whole = model(input_ids=ids, use_cache=False).logits
        worst = max(worst, (torch.cat(parts, dim=1) - whole).abs().max().item())
    return worst < 1e-4, f"segments and one pass differ by {worst:.1e}"


def per_token(times: Measure, tokens: int) -> Measure:
    return measure([times.low / tokens, times.median / tokens, times.high / tokens])


@torch.inference_mode()
def main() -> int:
    segment_option = {"type": int, "default": 128, "metavar": "TOKENS", "help": "new tokens read at once (128)"}
    sections = {f"{length}-keys": length for length in PAPER}
    bench = Benchmark("Evaluation with memory", __doc__, sections, arguments={"--segment": segment_option})
    torch.manual_seed(0)
    shape, segment = (QUICK_SHAPE if bench.quick else SHAPE), bench.args.segment
    if not bench.holds("memory", *memory_is_exact(shape)):
        return bench.finish()
    for section, keys in sections.items():
        if not bench.start(section, NOTE.format(segment=segment)):
            continue
        length = keys // 20 if bench.quick else keys
        remembering = Reader(transformer_xl(shape, length), None, segment)
        rotary = rope_decoder(shape, length)
        rolling = Reader(rotary, PatternCache.from_config(rotary.config), segment)
        window, ids = vanilla(shape, length), torch.randint(0, shape["vocab_size"], (1, length))
        contenders = {
            "memory": remembering,
            "cache": rolling,
            "window": lambda model=window, ids=ids: model(input_ids=ids, use_cache=False, logits_to_keep=1),
        }
        for reader in (remembering, rolling):
            reader.fill(length)
        times = bench.times(contenders, rounds=2)
        ours = per_token(times["memory"], segment)
        case = f"{length:,} keys; work {work_ratio(shape, length, segment):,.0f}"
        bench.add(case, ours, times["window"], peer_name="window", must=MUST.get(length), stretch=PAPER.get(length))
        bench.add(f"{length:,} keys", ours, per_token(times["cache"], segment), peer_name="RoPE, rolling cache")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
