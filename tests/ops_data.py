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


def resize(image_hwc, box, size, *, flip=False, method="bilinear"):
    """One image through the resize of the crop operations: uint8 [*size, 3]."""
    from fast_imagenet.ops.resize import METHODS, resize_box

    top, left, height, width = box
    image_hwc, result_hwc = np.ascontiguousarray(image_hwc), np.empty((*size, 3), np.uint8)
    resize_box(
        *(np.uintp(image_hwc.ctypes.data), image_hwc.strides[0]),
        *((top, top + height), (left, left + width), tuple(map(float, box))),
        *(np.uintp(result_hwc.ctypes.data), *size, flip, METHODS[method]),
    )
    return result_hwc
