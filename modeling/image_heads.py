"""From hidden states to the next value of an image: a softmax over the ids, or a mixture of logistics over pixels.

Parmar et al. 2018 (arXiv:1802.05751), section 3.4. Both hand out logits of the next id, so sampling is the same.

Shapes: B batch, T values, C channels, V ids.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from .mixture_of_logistics import ChannelMixture, channel_mixture, log_prob_of_pixels, num_parameters

IGNORED = -100


class CategoricalOutput(nn.Module):
    """One softmax over the ids, the same for all channels."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    @property
    def num_targets(self) -> int:
        """How many ids can be predicted."""
        return self.config.vocab_size

    @staticmethod
    def new_layer(config) -> nn.Linear:
        """The linear layer from hidden states to logits."""
        return nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, layer: nn.Linear, hidden_states, ids, first, kept, targets, enlarged=None):
        """Logits [B, T, V] and what each target [B, T] costs in nats; arguments as of MixtureOutput."""
        logits = layer(hidden_states[:, kept])
        if targets is None:
            return logits, None
        nats = cross_entropy(logits.float().transpose(1, 2), targets[:, kept], ignore_index=IGNORED, reduction="none")
        return logits, nats


class MixtureOutput(nn.Module):
    """A mixture of discretised logistics over pixels, handed out as exact conditional logits of the next channel."""

    def __init__(self, config):
        super().__init__()
        self.vocab_size, self.num_values, self.channels = config.vocab_size, config.num_values, config.num_channels

    @property
    def num_targets(self) -> int:
        """How many ids can be predicted: values, and no start tokens."""
        return self.num_values

    @staticmethod
    def new_layer(config) -> nn.Linear:
        """The linear layer from hidden states to the parameters of mixtures."""
        return nn.Linear(config.hidden_size, num_parameters(config.num_mixtures, config.num_channels), bias=False)

    def forward(
        self,
        layer: nn.Linear,
        hidden_states: torch.Tensor,
        ids: torch.Tensor,
        first: int,
        kept: slice | torch.Tensor,
        targets: torch.Tensor | None,
        enlarged: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            layer: what `new_layer` made.
            hidden_states: [B, T, hidden]; the values of a pixel share one.
            ids: [B, C - 1 + T] the ids given so far, from C - 1 before the first of these T on.
            first: how many ids came before these T.
            kept: those of the T positions that are asked for.
            targets: [B, T] next values; IGNORED ones cost nothing.
            enlarged: [B, pixels, C] what mixtures are measured from, in the order of generation; None for 0.

        Returns:
            Logits [B, T, V], float32, of start tokens the lowest there is; None in training with targets, whose nats
            need no logits of other values. And the nats [B, T]; None without targets.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):  # brightness needs more than bfloat16's 8 bits
            if self.training and targets is not None and self._are_pixels(hidden_states.shape[1], first, kept):
                return None, self._nats_of_pixels(layer, hidden_states, ids, first, targets, enlarged)
            mixture = self._mixture(_exact(layer, hidden_states[:, kept]), ids, first, kept, enlarged)
            nats = None if targets is None else _nats(mixture.log_prob, targets[:, kept], self.num_values)
            logits = None if self.training and nats is not None else self._logits(mixture)
        return logits, nats

    def _are_pixels(self, length: int, first: int, kept) -> bool:
        """Are these T positions the values of whole pixels, and all of them asked for?"""
        everything = isinstance(kept, slice) and not kept.start
        return everything and first % self.channels == 0 and length % self.channels == 0

    def _nats_of_pixels(self, layer, hidden_states, ids, first: int, targets, enlarged) -> torch.Tensor:
        """What targets cost, as `_mixture` has it; what the values of a pixel share is worked out once."""
        parameters = _exact(layer, hidden_states[:, :: self.channels])  # [B, P, .]
        earlier = pad(ids[:, self.channels :], (0, 1)).clamp(max=self.num_values - 1).unflatten(1, (-1, self.channels))
        count = parameters.shape[1]
        origin = None if enlarged is None else enlarged[:, first // self.channels :][:, :count]

        def log_prob(values: torch.Tensor) -> torch.Tensor:
            values = values.unflatten(1, (-1, self.channels))
            return log_prob_of_pixels(parameters, values, earlier, self.num_values, origin).flatten(1)

        return _nats(log_prob, targets, self.num_values)

    def _mixture(self, parameters: torch.Tensor, ids: torch.Tensor, first: int, kept, enlarged) -> ChannelMixture:
        length = ids.shape[1] - self.channels + 1
        places = (first + torch.arange(length, device=ids.device))[kept]  # [T]
        channel = places % self.channels
        known = ids.clamp(max=self.num_values - 1)
        recent = [known[:, place + 1 : place + 1 + length] for place in range(self.channels - 1)]
        recent = torch.stack([*recent, torch.zeros_like(known[:, :length])], dim=-1)[:, kept]  # [B, T, C]
        # Channel j of this pixel is so many values ago; where it is not known yet, the 0 at the end stands for it.
        ago = torch.arange(self.channels, device=ids.device) + self.channels - 1 - channel[:, None]
        earlier = recent.gather(-1, ago.clamp(max=self.channels - 1).expand_as(recent))
        origin = None if enlarged is None else enlarged[:, places // self.channels]
        return channel_mixture(parameters, channel.expand(recent.shape[:2]), earlier, self.num_values, origin)

    def _logits(self, mixture: ChannelMixture) -> torch.Tensor:
        logits = mixture.log_probs()
        return pad(logits, (0, self.vocab_size - self.num_values), value=torch.finfo(logits.dtype).min)


def _exact(layer: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """The layer's outputs, in at least float32."""
    parameters = layer(hidden_states.to(layer.weight.dtype))
    return parameters.to(torch.promote_types(parameters.dtype, torch.float32))


def _nats(log_prob: Callable, targets: torch.Tensor, num_values: int) -> torch.Tensor:
    """[B, T] what targets cost; IGNORED ones nothing."""
    return -log_prob(targets.clamp(0, num_values - 1)).masked_fill(targets == IGNORED, 0.0)


OUTPUTS: dict[str, type[nn.Module]] = {"categorical": CategoricalOutput, "logistic_mixture": MixtureOutput}


def next_values(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T] what each position predicts: `shift_labels` as they are, or `labels` one place to the left."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def mean_nats(nats: torch.Tensor, targets: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean over targets that are not IGNORED, or their sum over `num_items_in_batch`."""
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return nats.sum() / (items.to(nats.device) if torch.is_tensor(items) else items)
