"""Which classes a network sees in images: the five likeliest of each, with their probabilities.

    python -m tools.predict --weights runs/NAME/weights.safetensors photo.jpg other.png
    python -m tools.predict --weights model.pth --model.arch=resnet50 photo.jpg

Images are cropped, resized and normalized as in the config eval of the run that made the weights,
or as the library says that published them; what neither says is printed or asked for. A probability
is the softmax of the logits.
"""

from __future__ import annotations

import argparse

from fast_imagenet.data.class_lists import class_name
from fast_imagenet.program import run_program
from fast_imagenet.terminal import announce
from tools.arguments import parse


def main(argv: list[str] | None = None) -> None:
    """Print the classes of every image."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.predict", None, __doc__, formatter_class=form)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, BMP or GIF")
    args = parse(parser, argv)
    announce("importing PyTorch and FFCV: about 10 s")
    from tools.network import open_network, read_image

    network = open_network(args.weights, args.flags, "-m tools.predict")
    for path in args.images:
        (logits_k,) = network.logits(network.inputs([read_image(path)]))
        best = logits_k.softmax(0).topk(min(5, len(logits_k)))
        print(path)
        for probability, k in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            identifier = network.classes[k]
            name = class_name(identifier)
            print(f"{100 * probability:7.2f} %  {identifier}" + f"  {name}" * (name != identifier))


if __name__ == "__main__":
    run_program("predict", main)
