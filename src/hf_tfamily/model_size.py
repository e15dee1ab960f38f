"""How large a model is, said before any memory is taken for it."""

import os

import torch
from transformers import PreTrainedConfig


def count_parameters(auto_class: type, config: PreTrainedConfig) -> int:
    """Number of parameters of the model that `config` describes. Raises ValueError for sizes that no tensor has."""
    try:
        with torch.device("meta"):
            return auto_class.from_config(config).num_parameters()
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        sizes = {name: value for name, value in vars(config).items() if type(value) is int and value > 10**6}
        if not sizes:
            raise
        said = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(f"a model of {said} is larger than any tensor can be; choose smaller sizes.") from error


def check_memory(auto_class: type, config: PreTrainedConfig) -> None:
    """Raise ValueError if the weights alone are larger than the memory of this machine."""
    parameters = count_parameters(auto_class, config)
    needed, there = parameters * (config.dtype or torch.get_default_dtype()).itemsize, _memory()
    if there is not None and needed > there:
        raise ValueError(
            f"the weights, {parameters:,} parameters, take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{there / 2**30:,.0f} GiB of memory; choose smaller sizes, such as hidden_size or num_hidden_layers."
        )


def _memory() -> int | None:
    """Bytes of memory of this machine, where the system says so."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
