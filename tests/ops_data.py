"""Pictures and small FFCV files for the tests of the operations."""

import cv2
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields import rgb_image as ffcv_rgb_image
from ffcv.writer import DatasetWriter

from fast_imagenet import jpeg


def picture(height, width, seed=0):
    """Smooth colour with some noise: compresses like a photograph. uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(0, 255, (height // 24 + 2, width // 24 + 2, 3)).astype(np.float32)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


class Pictures:
    """A data set of (picture, index) for FFCV's writer."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


def write_file(path, images, monkeypatch, mode="jpg", markers=True, **options):
    """A .beton file by FFCV's own writer; with `markers`, JPEGs come from our encoder."""
    with monkeypatch.context() as patch:
        if markers:
            patch.setattr(ffcv_rgb_image, "encode_jpeg", _encode_with_markers)
        fields = {"image": RGBImageField(write_mode=mode, **options), "label": IntField()}
        writer = DatasetWriter(str(path), fields, num_workers=1, page_size=1 << 21)
        writer.from_indexed_dataset(Pictures(images), chunksize=4, shuffle_indices=False)
    return str(path)


def _encode_with_markers(image, quality):
    return np.frombuffer(jpeg.encode_jpeg(image, quality), np.uint8)
