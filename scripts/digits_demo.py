"""A page in the browser on which a finished model draws digits.

    pip install -e ".[demo,tools]" && hf-tfamily train sparse_transformer/digits
    python scripts/digits_demo.py runs/sparse_transformer-digits

It is served to this machine alone; `--share` asks gradio for a public address.
"""

import argparse
from pathlib import Path

import gradio
from PIL.Image import Image, Resampling
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from hf_tfamily.finished import load_finished
from hf_tfamily.sampling import makes_pictures, sample, start_ids

SHOWN = 112  # pixels of a picture's side on the page


def draw(
    model: PreTrainedModel, processor: BaseImageProcessor, label: int, count: int, temperature: float, seed: int
) -> list[Image]:
    """`count` pictures of the class `label`."""
    set_seed(seed)
    ids = sample(model, start_ids(processor, count, [label]), temperature)
    return [picture.resize((SHOWN, SHOWN), Resampling.NEAREST) for picture in processor.decode(ids)]


def app(model: PreTrainedModel, processor: BaseImageProcessor) -> gradio.Interface:
    """The page. Raises ValueError where the model draws no pictures of classes."""
    if not makes_pictures(processor) or not processor.num_classes:
        raise ValueError(f"{type(model).__name__} draws no pictures of classes; train sparse_transformer/digits.")
    return gradio.Interface(
        lambda *inputs: draw(model, processor, *map(int, inputs[:2]), inputs[2], int(inputs[3])),
        inputs=[
            gradio.Radio(list(range(processor.num_classes)), value=3, label="digit"),
            gradio.Slider(1, 32, value=16, step=1, label="pictures"),
            gradio.Slider(0.1, 1.5, value=1.0, step=0.1, label="temperature"),
            gradio.Number(0, precision=0, label="seed"),
        ],
        outputs=gradio.Gallery(label="drawn", columns=4, height=460),
        title="Digits, value by value",
        description=f"{type(model).__name__}, {model.num_parameters():,} parameters",
        flagging_mode="never",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a finished model")
    parser.add_argument("--share", action="store_true", help="a public address, by gradio's servers")
    parser.add_argument("--port", type=int, help="to serve at (by default the first that is free from 7860 on)")
    args = parser.parse_args()
    finished = load_finished(args.folder)
    app(finished.model, finished.processor).launch(share=args.share, server_port=args.port)


if __name__ == "__main__":
    main()
