"""From hidden states to the next value of an image: a softmax over the ids, or a mixture of logistics over pixels.

Parmar et al. 2018 (arXiv:1802.05751), section 3.4. Both hand out logits of the next id, so sampling is the same.

Shapes: B batch, T values, C channels, V ids.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from .mixture_of_logistics import channel_mixture, num_parameters

IGNORED = -100


class CategoricalHead(nn.Linear):
    """One softmax for the values of all channels."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size)

    def forward(
        self, hidden_states: torch.Tensor, ids: torch.Tensor | None, first: int, kept, targets: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [B, T, V], and what each target [B, T] costs in nats; see `MixtureHead`."""
        logits = super().forward(hidden_states[:, kept])
        if targets is None:
            return logits, None
        nats = cross_entropy(logits.float().transpose(1, 2), targets[:, kept], ignore_index=IGNORED, reduction="none")
        return logits, nats


class MixtureHead(nn.Module):
    """A mixture of discretised logistics over pixels, handed out as exact conditional logits of the next channel."""

    def __init__(self, config):
        super().__init__()
        self.vocab_size, self.num_values, self.channels = config.vocab_size, config.num_values, config.num_channels
        parameters = num_parameters(config.num_mixtures, config.num_channels)
        self.projection = nn.Linear(config.hidden_size, parameters, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, ids: torch.Tensor, first: int, kept, targets: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: [B, T, hidden]; the values of a pixel share one.
            ids: [B, C - 1 + T] the ids given so far, from C - 1 before the first of these T on.
            first: how many ids came before these T.
            kept: index of those of the T positions that are asked for.
            targets: [B, T] next values; IGNORED ones cost nothing.

        Returns:
            Logits [B, T, V], float32, of start tokens the lowest there is; None in training with targets, whose nats
            need no logits of other values. And the nats [B, T]; None without targets.
        """
        channel = ((first + torch.arange(hidden_states.shape[1], device=ids.device)) % self.channels)[kept]
        earlier = self._earlier(ids)[:, kept].gather(-1, self._places(channel).expand(len(ids), -1, -1))
        with torch.autocast(hidden_states.device.type, enabled=False):
            exact = torch.promote_types(hidden_states.dtype, torch.float32)
            parameters = nn.functional.linear(hidden_states[:, kept].to(exact), self.projection.weight.to(exact))
            mixture = channel_mixture(parameters, channel.expand(earlier.shape[:-1]), earlier, self.num_values)
            nats = logits = None
            if targets is not None:
                nats = self._nats(mixture, targets[:, kept])
            if nats is None or not self.training:
                spare = self.vocab_size - self.num_values
                logits = pad(mixture.log_probs(), (0, spare), value=torch.finfo(exact).min)
        return logits, nats

    def _nats(self, mixture, targets: torch.Tensor) -> torch.Tensor:
        real = targets != IGNORED
        return -mixture.log_prob(targets.clamp(0, self.num_values - 1)).masked_fill(~real, 0.0)

    def _earlier(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T, C]: the C - 1 ids up to each position, and a 0."""
        ids = ids.clamp(max=self.num_values - 1)
        length = ids.shape[1] - self.channels + 1
        recent = [ids[:, place + 1 : place + 1 + length] for place in range(self.channels - 1)]
        return torch.stack([*recent, torch.zeros_like(ids[:, :length])], dim=-1)

    def _places(self, channel: torch.Tensor) -> torch.Tensor:
        """[T, C]: where among `_earlier` channel j of the same pixel is; the last place for those not yet known."""
        j = torch.arange(self.channels, device=channel.device)
        return (j + self.channels - 1 - channel[:, None]).clamp(max=self.channels - 1)


HEADS: dict[str, type[nn.Module]] = {"categorical": CategoricalHead, "logistic_mixture": MixtureHead}


def next_values(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T] what each position predicts: `shift_labels` as they are, or `labels` one place to the left."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def mean_nats(nats: torch.Tensor, targets: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean over targets that are not IGNORED, or their sum over `num_items_in_batch`."""
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    items = items.to(nats.device) if torch.is_tensor(items) else items
    return nats.sum() / items
