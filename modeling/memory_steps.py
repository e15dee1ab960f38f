"""One step of decoding: the tokens that a forward pass adds to a cache, as positions.

Shapes: B batch, T new tokens; R rows: 1 where the whole batch stands at the same position, else B. -1 is no position.
"""

from collections.abc import Callable
from functools import cached_property

import torch

from .attention_masks import token_positions


class Step:
    """The tokens of one forward pass, and what was worked out for them.

    Attributes:
        positions: [R, T].
        past_length: how many tokens came before, padding included.
        past_end: one more than the highest position that any row has reached before.
    """

    def __init__(self, positions: torch.Tensor, past_length: int, past_end: int, batch_size: int, device: torch.device):
        self.positions = positions
        self.past_length = past_length
        self.past_end = past_end
        self.batch_size = batch_size
        self.device = device
        self.length = positions.shape[1]
        self.is_first = past_length == 0
        self._worked_out: dict = {}

    @classmethod
    def of_call(
        cls,
        hidden_states: torch.Tensor,
        past_length: int,
        past_end: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> "Step":
        """From what a forward pass is given: states [B, T, hidden], mask [B, past + T], positions [B or 1, T]."""
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None:
            wanted = [batch_size, past_length + length]
            if list(attention_mask.shape) != wanted:
                raise ValueError(
                    f"A pattern-aware cache takes an attention_mask of shape [batch, past + new tokens] = {wanted}, "
                    f"got {list(attention_mask.shape)}; for other masks pass past_key_values=DynamicCache()."
                )
            positions = token_positions(attention_mask).masked_fill(attention_mask == 0, -1)[:, past_length:]
        elif position_ids is not None:
            positions = position_ids.expand(batch_size, -1)
            if bool((positions.diff(dim=-1) != 1).any()):
                raise ValueError(
                    "A pattern-aware cache holds one document a row, but position_ids start anew within a row; "
                    "pass use_cache=False or past_key_values=DynamicCache()."
                )
        else:  # on the CPU, where its values cost no synchronisation
            positions = torch.arange(past_length, past_length + length)[None]
        return cls(positions, past_length, past_end, batch_size, hidden_states.device)

    @cached_property
    def first(self) -> torch.Tensor:
        """Lowest position of each row's new tokens, [R, 1]; 0 for a row of padding."""
        beyond = self.last + 1
        lowest = torch.where(self.positions < 0, beyond, self.positions).amin(dim=1, keepdim=True)
        return lowest.clamp(min=0)

    @cached_property
    def last(self) -> torch.Tensor:
        """Highest position of each row's new tokens, [R, 1]."""
        return self.positions.amax(dim=1, keepdim=True)

    @cached_property
    def end(self) -> int:
        """One more than the highest position that any row has reached."""
        return max(self.past_end, int(self.last.max()) + 1)

    @property
    def newest(self) -> torch.Tensor:
        """Highest position to read, [R, 1]: a single token is stored before it reads, several are stored after."""
        return self.first if self.length == 1 else self.first - 1

    def once(self, method) -> torch.Tensor:
        """`method(self)`, worked out once for all layers."""
        if method not in self._worked_out:
            self._worked_out[method] = method(self)
        return self._worked_out[method]

    def shortened(self, length: int) -> "Step":
        """The step of its first `length` tokens; stores keep the room that they have."""
        return Step(self.positions[:, :length], self.past_length, self.end, self.batch_size, self.device)

    def following(self) -> "Step":
        """Two more tokens, of which nothing is stored yet."""
        positions = self.last + torch.arange(1, 3, device=self.last.device)
        return Step(positions, self.past_length + self.length, self.end, self.batch_size, self.device)

    def with_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Step":
        """The step of a batch whose rows were reordered, chosen or repeated by `change`."""
        if len(self.positions) == 1 and self.batch_size > 1:
            return self
        positions = change(self.positions)
        return Step(positions, self.past_length, self.past_end, len(positions), self.device)

    def __getstate__(self) -> dict:
        """Copies and files leave out what can be worked out anew."""
        return {**self.__dict__, "_worked_out": {}}
