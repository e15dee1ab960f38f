"""Default target modules for PEFT, so that `LoraConfig()` without target_modules fits every system.

PEFT looks them up by model type in public tables of its own, which have no other way in.
"""

LIKE_LORA = ("q_proj", "v_proj")
IA3 = ("k_proj", "v_proj", "down_proj", "fc2")  # Swin calls its second layer fc2
IA3_FEEDFORWARD = ("down_proj", "fc2")


def register_peft_defaults() -> None:
    """Tell PEFT which layers LoRA, its relatives, and IA3 adapt in each of our systems by default.

    Raises:
        ImportError: if PEFT is not installed.
    """
    from .auto import SYSTEMS
    from .data.sequences import require

    constants = require("peft.utils.constants")

    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    relatives = [table for table in vars(constants).values() if isinstance(table, dict) and _is_like(table, lora)]
    for system in SYSTEMS:
        for table in relatives:
            table.setdefault(system.name, list(LIKE_LORA))
        constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.setdefault(system.name, list(IA3))
        constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.setdefault(system.name, list(IA3_FEEDFORWARD))


def _is_like(table: dict, lora: dict) -> bool:
    """Most tuners' tables are copies of LoRA's; those of others name other modules."""
    return table.get("llama") == lora["llama"] and table.get("gpt2") == lora["gpt2"]
