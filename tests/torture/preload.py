"""What train_imagenet.py imports, read once in the process that trainers are forked from."""

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

import train_imagenet  # noqa: F401
from fast_imagenet.data import ffcv_loader as loader  # noqa: F401

assert torch.get_num_threads() == 1, "a thread that is not forked would be waited for"
