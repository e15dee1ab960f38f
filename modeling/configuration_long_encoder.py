"""Configuration of the long encoder: Longformer (Beltagy et al. 2020, arXiv:2004.05150), BigBird (Zaheer et al. 2020,
arXiv:2007.14062) and the global-local attention of ETC (Ainslie et al. 2020, arXiv:2004.08483)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .attention_patterns import BlockTable, Pattern, check_count, check_known
from .checks import check_sizes
from .configuration_vanilla_encoder import VanillaEncoderConfig

GLOBAL_TOKENS = ("by_task", "first", "edges", "none")
# Encodings that tell nothing by distance, so that global tokens may have projections of their own.
OF_TOKENS = ("learned", "learned_per_layer", "sinusoidal", "none")

PAPER_LENGTHS = (1024, 3072, 4096)  # for which BigBird's published code has a draw of its own
PAPER_LAST = 1024  # and draws blocks that end before it


@dataclass(frozen=True)
class BigBirdBlocks(Pattern):
    """Random blocks as BigBird's published code and stock BigBird in training draw them, with NumPy.

    The draw depends on the length of the rows (`bind`), where it is one of PAPER_LENGTHS; all others share one.

    Attributes:
        block: tokens of a block.
        count: blocks that a block of queries sees beside its neighbours.
        heads: number of heads, which draw in turn.
        longest: the model's max_position_embeddings.
        seed: number of the layer.
    """

    type: ClassVar[str] = "big_bird_blocks"
    block: int
    count: int
    heads: int
    longest: int
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("block", "count", "heads", "longest"):
            check_count(self, field)
        check_count(self, "seed", lowest=0)

    def visible(self, head, query, key):
        raise ValueError("BigBirdBlocks needs to know how many tokens there are; use pattern.bind((tokens,)).")

    def check_heads(self, num_heads: int) -> None:
        if num_heads != self.heads:
            raise ValueError(f"BigBirdBlocks.heads={self.heads} must be num_attention_heads={num_heads}.")

    def bind(self, grid: tuple[int, ...]) -> BlockTable:
        blocks = -(-grid[0] // self.block)
        if blocks * self.block in PAPER_LENGTHS and blocks <= self.longest // self.block:
            return _paper_table(self)
        return _usual_table(self, max(blocks, -(-self.longest // self.block)))


@lru_cache(maxsize=64)
def _usual_table(drawn: BigBirdBlocks, blocks: int) -> BlockTable:
    """Among the first 2 count + 5 blocks, without the first, the last of them, and the neighbours."""
    random, end = np.random.RandomState(drawn.seed), 2 * drawn.count + 5
    rows: list[list[tuple[int, ...]]] = [[()] for _ in range(drawn.heads)]
    for row in range(1, blocks):
        hidden = {row - 1, row, row + 1, 0, end - 1} | ({end - 2} if row == 1 else set())
        hidden |= {1} if row == end - 2 else set()
        for head in rows:
            shuffled = random.permutation(np.arange(end, dtype=np.int32)).tolist()
            head.append(tuple([number for number in shuffled if number not in hidden][: drawn.count]))
    return BlockTable(drawn.block, tuple(map(tuple, rows)))


@lru_cache(maxsize=64)
def _paper_table(drawn: BigBirdBlocks) -> BlockTable:
    """Among the blocks up to PAPER_LAST, without the neighbours, but for the last two rows of the longest."""
    random, blocks = np.random.RandomState(drawn.seed), drawn.longest // drawn.block
    middle = np.arange(1, blocks - 1, dtype=np.int32)
    last = PAPER_LAST // drawn.block - 1 if 2 * drawn.block < PAPER_LAST else blocks - 1
    rows = []
    for _ in range(drawn.heads):
        head = [()]
        for row in range(1, blocks - 1):
            start, chosen = row - 2, np.concatenate((middle[: max(row - 2, 0)], middle[row + 1 : last]))
            if row in (1, 2):
                chosen = middle[row + 1 : last]
            elif row >= blocks - 3 or start > last:
                chosen = middle[:last]
            elif row + 1 == last:
                chosen = middle[:start]
            head.append(tuple(random.permutation(chosen)[: drawn.count].tolist()))
        rows.append((*head, ()))
    return BlockTable(drawn.block, tuple(rows))


@strict
class LongEncoderConfig(VanillaEncoderConfig):
    """A vanilla encoder for long documents. The defaults are Longformer base.

    Args:
        attention_patterns: which tokens self-attention sees beside the global ones: one pattern dict, or a list of them
            cycled over the layers; 256 on either side if None, and {"type": "full"} for all tokens.
        global_projections: give global tokens queries, keys and values of their own (Longformer, section 3.1).
        global_tokens: which tokens are global where the caller gives no global_attention_mask: "by_task" as Longformer
            has it (the first token for classes of rows, the question for answers, else none), "first" ones of each row
            (ETC), "edges", the first and the last block of each row (BigBird), or "none".
        num_global_tokens: number of "first" tokens, or length of the blocks that "edges" are.
        sep_token_id: what ends a question.
        pooler_act: activation between the two layers of a classifier of rows.

    All other fields are those of VanillaEncoderConfig.
    """

    model_type = "long_encoder"

    vocab_size: int = 50265
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    type_vocab_size: int = 1
    global_projections: bool = True
    global_tokens: str = "by_task"
    num_global_tokens: int = 1
    sep_token_id: int | None = 2
    pooler_act: str = "tanh"
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.attention_patterns is None:
            self.attention_patterns = {"type": "local", "window": 257}
        super().__post_init__(**kwargs)

    def validate_global_tokens(self):
        """What is global is known, and can be told apart from other tokens."""
        check_known(self, "global_tokens", GLOBAL_TOKENS)
        check_known(self, "pooler_act", ACT2FN)
        check_sizes(self, "num_global_tokens")
        if self.global_projections and self.position_encoding not in OF_TOKENS:
            raise ValueError(
                f"position_encoding={self.position_encoding!r} scores distances, which global_projections=True do not "
                f"know; use one of {', '.join(OF_TOKENS)}, or set global_projections to False."
            )


__all__ = ["BigBirdBlocks", "LongEncoderConfig"]
