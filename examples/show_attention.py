"""What each exit of a checkpoint looks at, as a picture.

python examples/show_attention.py runs/quickstart photo.jpg another.png --output attention.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_scan  # noqa: F401  (the classes above know its checkpoints then)
from hf_scan.reporting.plotting import plot_attention


def main(model_name: str, images: list[Path], output: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(model_name)
    processor = AutoImageProcessor.from_pretrained(model_name)
    pictures = [Image.open(path).convert("RGB") for path in images]
    pixel_values = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    plot_attention(model, pixel_values, output)
    print(f"Written to {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint: a folder, or a name on the Hub")
    parser.add_argument("images", type=Path, nargs="+", help="image files, of any format that Pillow reads")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="the picture to write")
    arguments = parser.parse_args()
    main(arguments.model, arguments.images, arguments.output)
