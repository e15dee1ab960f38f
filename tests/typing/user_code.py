"""What people write, as mypy sees it: right uses pass, and each wrong one is found. Nobody runs it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tfamily import (
    Fixed,
    Local,
    PatternCache,
    PerHead,
    RecurrentTrainer,
    RoPEDecoderConfig,
    RoPEDecoderForCausalLM,
    Sink,
    Strided,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    Union,
    load_data,
    push,
    register_peft_defaults,
    set_attention_patterns,
)

# Patterns.
window = Local(window=64)
both = Union([window, Strided(stride=8)])
heads = PerHead([both, Fixed(block=8, summary=2)])
sinks: list[Local | Sink] = [Local(12), Sink(4)]
kept: int = window.window
Local(windw=64)  # type: ignore[call-arg]
Strided()  # type: ignore[call-arg]
wrong: str = window.window  # type: ignore[assignment]

# Stock models.
llama = LlamaForCausalLM(LlamaConfig())
set_attention_patterns(llama, window)
set_attention_patterns(llama, [window, both])
set_attention_patterns(llama, None)
set_attention_patterns(llama)  # type: ignore[call-arg]
set_attention_patterns(llama, 64)  # type: ignore[arg-type]

# Our own.
decoder = RoPEDecoderForCausalLM(RoPEDecoderConfig(attention_patterns=window.to_dict()))
output = decoder(torch.zeros(1, 4, dtype=torch.long), past_key_values=PatternCache.from_config(decoder.config))
reader = TransformerXLForCausalLM(TransformerXLConfig(mem_len=128))
RecurrentTrainer(model=reader)
register_peft_defaults()
register_peft_defaults(3)  # type: ignore[call-arg]

# Data and the Hub.
data = load_data({"source": "digits"})
examples: str = data.description
print(data.descriptions)  # type: ignore[attr-defined]
load_data("digits")  # type: ignore[arg-type]
push(Path("runs/digits"), "somebody/digits", private=True)
push(Path("runs/digits"))  # type: ignore[call-arg]
