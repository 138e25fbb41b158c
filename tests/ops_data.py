"""Images and small FFCV files for the tests of the operations."""

import cv2
import numpy as np

from benchmarks import data


def image(height, width, seed=0):
    """Smooth colour with some noise: compresses like a photograph. uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(0, 255, (height // 24 + 2, width // 24 + 2, 3)).astype(np.float32)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def write_file(path, images, mode="jpg", markers=True, **options):
    """A .beton file by FFCV's own writer; with `markers`, JPEGs come from our encoder."""
    options = {"page_size": 1 << 21, "chunksize": 4, **options}
    return data.write_file(path, images, mode=mode, markers=markers, **options)
