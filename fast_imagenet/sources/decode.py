"""Bytes of an image -> RGB pixels, exactly as Pillow's `convert('RGB')` gives them.

The kind is taken from the content, never from the name. EXIF orientation is not applied, as in
torchvision and timm. Plain JPEGs go through OpenCV, which gives the same pixels (both carry
libjpeg-turbo) a little sooner.
"""

import io
import warnings
from functools import cache

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from fast_imagenet.sources.base import ImageError

# Few kinds on purpose: the security holes of image libraries are found in the rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 100_000_000
ORIENTATION_TAG = 0x0112
CLIPPED = "16bit_clipped"  # 16-bit gray of which Pillow keeps no more than what is below 256
_FORMAT_OF_SUFFIX = {"jpg": "JPEG", "jpeg": "JPEG", **{name.lower(): name for name in FORMATS}}


def decode_rgb(data: bytes, name: str = "") -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode one image.

    Args:
        data: the whole file.
        name: its name, only to notice names that promise another format.

    Returns:
        Pixels as uint8 RGB [height, width, 3], and what is unusual about the file, out of: gray,
        cmyk, palette, alpha, 16bit, 16bit_clipped, misnamed, exif_orientation, broken_exif.

    Raises:
        ImageError: empty, truncated or not an image, an animation, or more than MAX_PIXELS pixels.
    """
    image, kinds = open_image(data, name)
    return decode_opened(image, data), kinds


def open_image(data: bytes, name: str = "") -> tuple[Image.Image, tuple[str, ...]]:
    """The image with only its header read, and what is unusual about it: see `decode_rgb`."""
    if not data:
        raise ImageError("the file is empty")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = _open(data)
        exif_kinds = _exif_kinds(image, caught)
        # before loading, which forgets how pixels were stored
        return image, _kinds(image, name) + exif_kinds


def decode_opened(image: Image.Image, data: bytes) -> np.ndarray:
    """Pixels of an image from `open_image`: see `decode_rgb`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rgb_hwc = _decode_plain_jpeg(image, data)
        return _convert(image) if rgb_hwc is None else rgb_hwc


def _open(data: bytes) -> Image.Image:
    """Read the header only, so that nothing large is allocated before the size is checked."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not an image of a known kind ({', '.join(FORMATS)}): it starts with {data[:8]!r}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than the allowed {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's parsers raise many kinds on damaged headers
        raise ImageError(f"the header cannot be read ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ImageError(f"{size} pixels, more than the allowed {MAX_PIXELS:,}")
    if animated:
        raise ImageError("an animation, not a single image")
    return image


def _decode_plain_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Pixels of a sound baseline JPEG with one or three components, None for everything else.

    OpenCV silently fills what is missing in a damaged file with gray; Pillow refuses such a file.
    So whatever is not plainly sound is left to Pillow.
    """
    plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if not plain or "progressive" in image.info or not _is_sound_scan(data):
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    rgb_hwc = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if rgb_hwc is None or rgb_hwc.shape != (image.height, image.width, 3):
        return None
    return rgb_hwc


def _is_sound_scan(data: bytes) -> bool:
    """Whether nothing but stuffed bytes and restart markers stands between the last SOS and EOI."""
    stored = np.frombuffer(data, np.uint8)
    markers = stored[np.flatnonzero(stored[:-1] == 0xFF) + 1]
    scans = np.flatnonzero(markers == 0xDA)
    if not len(scans) or not data.endswith(b"\xff\xd9"):
        return False
    inside = markers[scans[-1] + 1 : -1]
    return bool(((inside == 0) | (inside & 0xF8 == 0xD0)).all())


def _convert(image: Image.Image) -> np.ndarray:
    try:
        return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error ... on damaged data
        raise ImageError(f"cannot be decoded ({error})") from error


def _kinds(image: Image.Image, name: str) -> tuple[str, ...]:
    """What is unusual about the pixels or the name, from the header alone."""
    mode = image.mode
    sixteen = mode.startswith("I") or any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )
    found = {
        "gray": mode in ("1", "L", "LA") or mode.startswith("I"),
        "cmyk": mode == "CMYK",
        "palette": mode in ("P", "PA"),
        "alpha": mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
        "16bit": sixteen,
        CLIPPED: mode.startswith("I") and _clips_deep_gray(),
    }
    actual = "JPEG" if image.format == "MPO" else image.format or ""
    return tuple(kind for kind, is_so in found.items() if is_so) + kinds_of_name(name, actual)


@cache
def _clips_deep_gray() -> bool:
    """Whether this Pillow turns 16-bit gray above 255 to white; from version 13 on it scales."""
    return Image.new("I;16", (1, 1), 0x8000).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def kinds_of_name(name: str, actual: str) -> tuple[str, ...]:
    """('misnamed',) for a name that promises another format than the actual one."""
    promised = _FORMAT_OF_SUFFIX.get(name.rpartition(".")[2].lower())
    return ("misnamed",) if promised not in (None, actual) else ()


def _exif_kinds(image: Image.Image, caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    if "exif" not in image.info:
        return ()
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return ("broken_exif",)
    # Pillow only warns, in several wordings, when the directory of tags is damaged.
    if any("TiffImagePlugin" in warning.filename for warning in caught):
        return ("broken_exif",)
    return ("exif_orientation",) if orientation != 1 else ()
