"""Builds the library: see __init__.py."""

import sys

from fast_imagenet.native import build

try:
    build()
except RuntimeError as error:
    sys.exit(f"the writer's C library was not built: {error}")
