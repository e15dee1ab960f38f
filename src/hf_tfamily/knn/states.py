"""Which hidden state is the key, and how it is got out of any causal language model.

The paper's key is the input of the last layer's feed-forward network, behind its layer norm (Khandelwal et al. 2019,
arXiv:1911.00172, section 5); a hook reads it as it passes by. Shapes: B rows, T positions, E width.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

FFN_INPUT, FINAL = "ffn_input", "final"
# What model code calls a layer's feed-forward network, or the first half of it.
FFN_NAMES = (
    *("mlp", "feed_forward", "feedforward", "ffn", "ff", "fc1", "intermediate"),
    *("block_sparse_moe", "moe", "mlp_block"),
)


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for what is no causal language model of Transformers."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no PreTrainedModel. Of a PEFT model give merge_and_unload(), of a wrapped one "
            "what is inside."
        )
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"{type(model).__name__} is no causal language model (AutoModelForCausalLM loads them).")


def key_module(model: PreTrainedModel, keys: str) -> tuple[str, nn.Module]:
    """The module that keys are read at, and its dotted name.

    Args:
        keys: "ffn_input", "final", or the dotted name of a module, whose input is the key.

    Raises:
        ValueError: if there is no such module, or more than one could be meant.
    """
    check_model(model)
    modules = dict(model.named_modules())
    if keys == FINAL:
        if model.base_model is model:
            raise ValueError(f"{type(model).__name__} has no base model whose last hidden state could be read.")
        return model.base_model_prefix, model.base_model
    name = _last_feed_forward(model, modules) if keys == FFN_INPUT else keys
    if name not in modules or name == "":
        raise ValueError(
            f'keys must be "{FFN_INPUT}", "{FINAL}" or the name of a module of {type(model).__name__}, got {keys!r}.'
        )
    return name, modules[name]


def _last_feed_forward(model: PreTrainedModel, modules: dict[str, nn.Module]) -> str:
    """The name of the feed-forward network in the last of the model's layers."""
    stacks = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)}
    found = [
        f"{name}.{len(stack) - 1}.{child}"
        for name, stack in stacks.items()
        for child in FFN_NAMES
        if isinstance(getattr(stack[-1], child, None), nn.Module)
    ]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        what = f"could be any of {', '.join(outermost)}" if outermost else _children_of_last(stacks)
        raise ValueError(
            f"The feed-forward network of the last layer of {type(model).__name__} {what}. Give "
            f'keys="{FINAL}", or the name of the module whose input is to be the key.'
        )
    return outermost[0]


def _children_of_last(stacks: dict[str, nn.ModuleList]) -> str:
    last = {name: [child for child, _ in stack[-1].named_children()] for name, stack in stacks.items()}
    said = "; ".join(f"{name} of {', '.join(children)}" for name, children in last.items() if children)
    return f"has none of the names that are known ({', '.join(FFN_NAMES)}); there are layers {said or 'of none'}"


class StateRecorder:
    """While it is entered, keeps the keys of the model's last forward pass.

    Attributes:
        name: the module that they are read at.
        forwards: positions of each forward pass since `forget`.
    """

    def __init__(self, model: PreTrainedModel, keys: str = FFN_INPUT):
        self.model = model
        self.keys = keys
        self.name, self.module = key_module(model, keys)
        self.hooks: list = []
        self.forget()

    def __enter__(self) -> "StateRecorder":
        if self.hooks:
            raise RuntimeError("This one is entered already.")
        self.hooks.append(self.model.register_forward_pre_hook(lambda *_: self.begin()))
        if self.keys == FINAL:
            self.hooks.append(self.module.register_forward_hook(lambda _, inputs, output: self.keep(_first(output))))
        else:
            self.hooks.append(self.module.register_forward_pre_hook(self._keep_input, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.forget()

    def forget(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.forwards: list[int] = []

    def begin(self) -> None:
        self.pieces = []
        self.forwards.append(0)

    def keep(self, states: torch.Tensor) -> None:
        """Of a forward pass; several times where the network is called for some positions at a time."""
        self.pieces.append(states.detach())
        if self.forwards:
            self.forwards[-1] += states.shape[-2]

    def _keep_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        if not tensors:
            raise ValueError(f"{self.name} is called without a tensor, so that there is no key.")
        self.keep(tensors[0])

    def states(self, rows: int) -> torch.Tensor:
        """[B, T, E] float32 on the CPU, of the last forward pass of so many rows."""
        if not self.pieces:
            raise ValueError(f"{self.name} was not called, so that there is no key; give another name by keys.")
        pieces = [piece.reshape(rows, -1, piece.shape[-1]) for piece in self.pieces]
        return torch.cat(pieces, dim=1).float().cpu()


def _first(output) -> torch.Tensor:
    """The hidden states that a base model returns."""
    return output[0]
