"""Encode images as ordinary JPEG with restart markers, so that a reader can decode just a region.

A restart marker resets the decoder. With one every few MCUs (an MCU is the 16 x 16 pixel unit of
4:2:0 JPEG), at an interval that divides the MCUs of a row, the compressed data fall into tiles that
decode independently: `fast_imagenet.ops.CropDecode` decodes the tiles under a crop and skips the
rest. Optimized Huffman tables pay for the markers: 50 ImageNet images at 500 px, quality 90, came
out 2.4 % smaller than with FFCV's encoder. Every JPEG decoder reads them.
"""

import functools

import cv2
import numpy as np

# Chosen by measurement: longer intervals decode more pixels beside the crop, shorter ones cost
# bytes (interval 1: +4.2 %, 2: +2.5 %, 4: +1.5 %, 6: +1.3 % over none; 500 px, quality 90).
MAX_RESTART_INTERVAL = 4
MCU_SIDE = 16
MAX_SIDE = 65_500  # libjpeg's own limit (JPEG_MAX_DIMENSION)


def restart_interval(width: int, largest: int = MAX_RESTART_INTERVAL) -> int:
    """The largest number of MCUs, at most `largest` (>= 1), that divides the MCUs of a row.

    Args:
        width: image width in pixels, >= 1.
    """
    mcus_per_row = -(-width // MCU_SIDE)
    return max(n for n in range(1, largest + 1) if mcus_per_row % n == 0)


def encode_jpeg(
    image_hwc: np.ndarray, quality: int = 90, *, interval: int | None = None, optimize: bool = True
) -> bytes:
    """Encode as baseline 4:2:0 JPEG with restart markers.

    Args:
        image_hwc: uint8 [height, width, 3], RGB, sides 1 to 65500; any strides.
        quality: 1 to 100, libjpeg's scale.
        interval: MCUs between restart markers; None chooses `restart_interval(width)`, 0 writes
            none.
        optimize: build Huffman tables for this image: 3.8 % fewer bytes, 2.4 times the time.

    Raises:
        ValueError: another dtype or shape, a side or quality out of range.
    """
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[2] != 3:
        given = f"{image_hwc.dtype} {image_hwc.shape}"
        raise ValueError(f"image is {given}; give uint8 [height, width, 3] RGB")
    if not all(1 <= side <= MAX_SIDE for side in image_hwc.shape[:2]):
        raise ValueError(f"image is {image_hwc.shape[:2]}; JPEG sides are 1 to {MAX_SIDE}")
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is {quality}; give 1 to 100")
    if interval is None:
        interval = restart_interval(image_hwc.shape[1])
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, int(quality)),
        *(cv2.IMWRITE_JPEG_OPTIMIZE, int(optimize)),
        *(cv2.IMWRITE_JPEG_RST_INTERVAL, int(interval)),
        # explicit: the tiles above are 16 px wide only with this sampling
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
    ]
    image_bgr = cv2.cvtColor(np.ascontiguousarray(image_hwc), cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", image_bgr, options)
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {image_hwc.shape} as JPEG")
    return data.tobytes()


@functools.cache
def quantisers(quality: int) -> bytes:
    """The steps for luma and chroma that OpenCV writes: 2 x 64 bytes, in file order."""
    tiny = np.zeros((8, 8, 3), np.uint8)
    data = cv2.imencode(".jpg", tiny, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1].tobytes()
    return b"".join(part[1:65] for part in data.split(b"\xff\xdb\0\x43")[1:])
