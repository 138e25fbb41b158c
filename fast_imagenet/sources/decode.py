"""Bytes of an image -> RGB pixels, exactly as Pillow's `convert('RGB')` gives them.

But for 16-bit gray, which is scaled: Pillow below 13 makes white of all values above 255. The kind
is taken from the content, never from the name. EXIF orientation is not applied, as in torchvision
and timm. Sound baseline JPEGs are decoded by native/decode.c, to the same pixels.
"""

import io
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
from PIL import Image, UnidentifiedImageError

from fast_imagenet.sources.base import ImageError

# Few kinds on purpose: the security holes of image libraries are found in the rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 100_000_000
ORIENTATION_TAG = 0x0112
SCALED = "16bit_scaled"  # 16-bit gray, value / 257
REPAIRED = "repaired"  # a damaged JPEG of which libjpeg has made an image, with a warning
_FORMAT_OF_SUFFIX = {"jpg": "JPEG", "jpeg": "JPEG", **{name.lower(): name for name in FORMATS}}


def decode_rgb(data: bytes, name: str = "") -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode one image.

    Args:
        data: the whole file.
        name: its name, only to notice names that promise another format.

    Returns:
        Pixels as uint8 RGB [height, width, 3], and what is unusual about the file, out of: gray,
        cmyk, palette, alpha, 16bit, 16bit_scaled, misnamed, exif_orientation, broken_exif; repaired
        (see REPAIRED), unchecked (a JPEG that libturbojpeg cannot read, as of CMYK, or libturbojpeg
        is not there: whether it was repaired is not known).

    Raises:
        ImageError: empty, truncated or not an image, an animation, or more than MAX_PIXELS pixels.
    """
    image, kinds = open_image(data, name)
    rgb_hwc, more = decode_opened(image, data)
    return rgb_hwc, kinds + more


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


def decode_opened(image: Image.Image, data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels of an image from `open_image`, and what decoding has shown: see `decode_rgb`."""
    jpeg = _native() if image.format in ("JPEG", "MPO") else None
    size_hw = (image.height, image.width)
    if jpeg and image.mode in ("RGB", "L"):
        rgb_hwc, status = jpeg.decode_whole(data, size_hw, "only")
        if status == jpeg.GOOD:
            return rgb_hwc, ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rgb_hwc = _convert(image)
    if image.format not in ("JPEG", "MPO"):
        return rgb_hwc, ()
    status = jpeg.decode_whole(data, size_hw, own=False)[1] if jpeg else None
    if jpeg and status in (jpeg.GOOD, jpeg.WARNED):
        return rgb_hwc, () if status == jpeg.GOOD else (REPAIRED,)
    return rgb_hwc, ("unchecked",)


@cache
def _native() -> ModuleType | None:
    """Our decoder, None without libturbojpeg, which the torchvision backend does not need."""
    try:
        return import_module("fast_imagenet.native.decoder")
    except ImportError:
        return None


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


def _convert(image: Image.Image) -> np.ndarray:
    try:
        if image.mode.startswith("I"):  # Pillow below 13 would make white of all above 255
            gray_hw = (np.asarray(image).astype(np.uint32) + 128) // 257
            return np.repeat(gray_hw.astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error ... on damaged data
        raise ImageError(f"cannot be decoded ({error})") from error


def _kinds(image: Image.Image, name: str) -> tuple[str, ...]:
    """What is unusual about the pixels or the name, from the header alone."""
    mode = image.mode
    deep_gray = mode.startswith("I")
    deep = deep_gray or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    found = {
        "gray": mode in ("1", "L", "LA") or deep_gray,
        "cmyk": mode == "CMYK",
        "palette": mode in ("P", "PA"),
        "alpha": mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
        "16bit": deep,
        SCALED: deep_gray,
    }
    actual = "JPEG" if image.format == "MPO" else image.format or ""
    return tuple(kind for kind, is_so in found.items() if is_so) + kinds_of_name(name, actual)


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
