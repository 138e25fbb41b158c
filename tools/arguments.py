"""Arguments of the tools that open a file of weights; without torch, to be checked at once."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

SETTING = re.compile(r"--\w+\.\w+=")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a tool, with --weights, images and, as `flags`, settings of the trainer."""
    parser.add_argument("--weights", required=True, metavar="FILE", help=".pt, .pth, .safetensors")
    parser.epilog = "Settings of train_imagenet.py may follow, as in --model.arch=resnet50."
    args, args.flags = parser.parse_known_intermixed_args(argv)
    if wrong := [word for word in args.flags if not SETTING.match(word)]:
        parser.error(f"{wrong[0]} is neither an argument nor a setting, --section.key=value")
    if missing := [name for name in (args.weights, *args.images) if not Path(name).is_file()]:
        parser.error(f"{missing[0]} is not a file: check the path")
    return args
