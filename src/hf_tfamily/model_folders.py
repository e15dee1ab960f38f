"""Models of any folder or Hub repository: what they are for, and what belongs to them."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

# What is read of a repository: no pickles, and no code.
READ = ("*.json", "*.safetensors", "*.txt", "*.model", "recipe.yaml")
HEADS = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForMaskedLM: MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForImageClassification: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}


def local_folder(place: str | Path) -> Path:
    """The folder `place`, or one that the Hub's repository of that name was downloaded to.

    Raises ValueError, in one line, where there is neither.
    """
    folder = Path(place)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(place).startswith((".", "~")):
        raise ValueError(f"There is no folder {place}.")
    try:
        return Path(snapshot_download(str(place), allow_patterns=list(READ)))
    except Exception as error:  # the Hub's own, the network's, or of the name
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"{place} is no folder, and the Hub gives no model of that name ({reason}).") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """Its config. Raises ValueError where there is none, or none of a class that is known."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: neither config.json nor recipe.yaml is there.")
    return AutoConfig.from_pretrained(folder)


def auto_class_of(folder: Path, config: PreTrainedConfig) -> type:
    """The Auto class that loads the architecture named in a config. Raises ValueError where none of HEADS does."""
    names = config.architectures or ["nothing"]
    for auto_class, heads in HEADS.items():
        found = heads.get(type(config), ())
        found = found if isinstance(found, tuple) else (found,)
        if names[0] in {getattr(model_class, "__name__", None) for model_class in found}:
            return auto_class
    raise ValueError(
        f"{folder}: config.json names {names[0]} as its architecture, which neither generates, nor fills in, nor "
        "classifies pictures."
    )
