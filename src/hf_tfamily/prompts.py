"""Prompts: a text that a model goes on with, or whose hidden places it fills in."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from .data.text_lines import read_text
from .stream_evaluation import empty_past, has_memory, has_rolling_cache

STANDARD_INPUT = "-"
NEW_TOKENS = 240
# What `go_on` hands to `generate`, and the command line takes.
GENERATION_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
NO_TOKENIZER = "There is no tokenizer beside this model; give one: --tokenizer bytes, a folder, or a name on the Hub."


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    """The prompt that is given as text or as a file; "-" is standard input. None if neither is given.

    The line end behind the last line of a file, or of standard input, is not part of it.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("Give --prompt or --prompt-file, not both.")
    if prompt is None and prompt_file is None:
        return None
    if STANDARD_INPUT in (prompt, str(prompt_file)):
        return _checked(sys.stdin.read().removeprefix("\ufeff").removesuffix("\n").removesuffix("\r"))
    if prompt is not None:
        return _checked(prompt)
    if not prompt_file.is_file():
        raise FileNotFoundError(f"There is no prompt file {prompt_file}.")
    return read_text(prompt_file).removesuffix("\n").removesuffix("\r")


def _checked(prompt: str) -> str:
    """The prompt, if it is UTF-8: Python keeps other bytes of a command line as surrogates, which are no text."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("The prompt is no UTF-8 text.")
    return prompt


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt behind the tokenizer's start token, if it has one; of no text, what a text begins behind."""
    ids, start = tokenizer(prompt)["input_ids"], tokenizer.bos_token_id
    if start is not None and ids[:1] != [start]:
        return [start, *ids]
    if ids:
        return ids
    return tokenizer("\n")["input_ids"] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def go_on(model: PreTrainedModel, tokenizer: Any, prompt: str, count: int = 1, **options: Any) -> None:
    """Print `count` continuations of a prompt, word by word as they are made.

    A model with a memory reads the prompt in segments of config.segment_length, if it has one.

    Args:
        options: some of GENERATION_OPTIONS; what is left out is as the model's generation config has it.

    Raises:
        ValueError: if the prompt and what is to follow are longer than the model's positions.
    """
    model.eval()
    ids = prompt_ids(tokenizer, prompt)
    room = room_behind(model, len(ids), options.pop("max_new_tokens", None))
    settings = deepcopy(model.generation_config)
    settings.update(**{"do_sample": True, "num_beams": 1, "max_length": None, "max_new_tokens": room, **options})
    if settings.pad_token_id is None:
        settings.pad_token_id = ids[0]  # of one row, nothing is padded; generate() asks for one
    row = row_of(model, ids)
    for number in range(count):
        if number:
            print("\n==========\n")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            model.generate(
                row,
                attention_mask=torch.ones_like(row),
                generation_config=settings,
                past_key_values=empty_past(model),
                streamer=streamer,
            )


def row_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The ids as a batch of one, [1, N]. Raises ValueError where the model does not know one of them."""
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer makes id {max(ids)} of the prompt, and the model has vocab_size={model.config.vocab_size}; "
            "give the model's own by --tokenizer."
        )
    return torch.tensor([ids], device=model.device)


def room_behind(model: PreTrainedModel, length: int, asked: int | None) -> int:
    """How many tokens to make behind `length` of them: those asked for, else NEW_TOKENS or what there is room for.

    Raises ValueError where the model has not so many positions. The last token that is made needs none.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions or has_memory(model) or has_rolling_cache(model):
        return NEW_TOKENS if asked is None else asked
    room = positions + 1 - length
    if room < 1:
        raise ValueError(f"The prompt has {length} tokens, and the model takes {positions}; give a shorter one.")
    if asked is not None and asked > room:
        raise ValueError(
            f"--max-new-tokens {asked} is too many: behind the {length} tokens of the prompt the model's {positions} "
            f"positions leave room for {room}."
        )
    return min(NEW_TOKENS, room) if asked is None else asked


@torch.inference_mode()
def fill_in(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:
    """The prompt with the likeliest token in the place of each mask token.

    Raises ValueError if there is none in it, or it is too long for the model.
    """
    model.eval()
    mask = tokenizer.mask_token_id
    if mask is None:
        raise ValueError("The tokenizer beside this model has no mask token to fill in; give another by --tokenizer.")
    ids = prompt_ids(tokenizer, prompt)
    if mask not in ids:
        raise ValueError(f"The prompt holds no {tokenizer.mask_token} to fill in.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and len(ids) > positions:
        raise ValueError(f"The prompt has {len(ids)} tokens, and the model takes {positions}; give a shorter one.")
    row = row_of(model, ids)
    logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].float()
    logits[:, [number for number in tokenizer.all_special_ids if number < logits.shape[1]]] = -torch.inf
    logits[:, len(tokenizer) :] = -torch.inf
    filled = torch.where(row[0] == mask, logits.argmax(dim=-1), row[0])
    return tokenizer.decode(filled.tolist(), skip_special_tokens=True)
