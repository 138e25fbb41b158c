"""Image files that the tests make: the unusual ones that occur in ImageNet, and broken ones.

Each is bytes; names are those under which the files would lie in a data set.
"""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image


def scene(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """A smooth coloured image with an edge and little noise: uint8 RGB [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
    rgb_hwc = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    rgb_hwc[height // 3 :, width // 2 :] += 40
    rgb_hwc += rng.integers(-6, 7, rgb_hwc.shape, np.int16)
    return np.clip(rgb_hwc, 0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of `image` as a file of `kind`."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_jpeg(rgb_hwc: np.ndarray, **options) -> bytes:
    """A plain JPEG of `rgb_hwc`, quality 92 unless told."""
    return saved(Image.fromarray(rgb_hwc), "JPEG", **{"quality": 92, **options})


def png_16bit(gray_hw: np.ndarray) -> bytes:
    """A 16-bit gray PNG from uint16 [height, width]."""
    return cv2.imencode(".png", gray_hw)[1].tobytes()


def animated_gif(frames: int = 3) -> bytes:
    """An animation of a few different frames."""
    images = [Image.fromarray(scene(seed=seed)).convert("P") for seed in range(frames)]
    return saved(images[0], "GIF", save_all=True, append_images=images[1:])


def huge_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A header that promises 400 million pixels, with almost nothing behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _broken_exif() -> bytes:
    """EXIF that ends before its last entry, as in ImageNet's n04152593_17460.JPEG."""
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 3)
    return b"Exif\0\0" + tiff + struct.pack("<HHII", 0x010F, 2, 3, 0)


def odd_images() -> dict[str, tuple[bytes, set[str]]]:
    """File name -> (bytes, what the report must say about it). Every one is a complete image."""
    rgb = scene()
    gray = rgb[..., 1]
    alpha = np.dstack([rgb, np.linspace(0, 255, rgb[..., 0].size).reshape(gray.shape)])
    image, rgba = Image.fromarray(rgb), Image.fromarray(alpha.astype(np.uint8))
    transparent = saved(image.convert("P"), "PNG", transparency=3)
    deep = gray.astype(np.uint16) * 200
    return {
        "plain.JPEG": (as_jpeg(rgb), set()),
        "progressive.JPEG": (as_jpeg(rgb, progressive=True), set()),
        "full_chroma.JPEG": (as_jpeg(rgb, subsampling=0), set()),
        "half_chroma.JPEG": (as_jpeg(rgb, subsampling=1), set()),
        "one_pixel.JPEG": (as_jpeg(rgb[:1, :1]), set()),
        "odd_sides.JPEG": (as_jpeg(rgb[:37, :51]), set()),
        "trailing_bytes.JPEG": (as_jpeg(rgb) + b"left over by a camera", set()),
        "gray.JPEG": (saved(Image.fromarray(gray), "JPEG"), {"gray"}),
        "cmyk.JPEG": (saved(image.convert("CMYK"), "JPEG"), {"cmyk", "unchecked"}),
        "big_profile.JPEG": (as_jpeg(rgb, icc_profile=bytes(1_500_000)), set()),
        "turned.JPEG": (as_jpeg(rgb, exif=_exif(6)), {"exif_orientation"}),
        "upside_down.JPEG": (as_jpeg(rgb, exif=_exif(3)), {"exif_orientation"}),
        "broken_exif.JPEG": (as_jpeg(rgb, exif=_broken_exif()), {"broken_exif"}),
        "really_a_png.JPEG": (saved(rgba, "PNG"), {"alpha", "misnamed"}),
        "really_a_jpeg.png": (as_jpeg(rgb), {"misnamed"}),
        "alpha.png": (saved(rgba, "PNG"), {"alpha"}),
        "gray_alpha.png": (saved(rgba.convert("LA"), "PNG"), {"alpha", "gray"}),
        "palette.png": (saved(image.convert("P"), "PNG"), {"palette"}),
        "palette_alpha.png": (transparent, {"palette", "alpha"}),
        "one_bit.png": (saved(image.convert("1"), "PNG"), {"gray"}),
        "sixteen_bit.png": (png_16bit(deep), {"16bit", "16bit_scaled", "gray"}),
        "sixteen_bit_colour.png": (png_16bit(np.dstack([deep] * 3)), {"16bit"}),
        "still.gif": (saved(image.convert("P"), "GIF"), {"palette"}),
        "image.bmp": (saved(image, "BMP"), set()),
        "image.webp": (saved(image, "WEBP", lossless=True), set()),
        "alpha.webp": (saved(rgba, "WEBP", lossless=True), {"alpha"}),
        "no_suffix": (as_jpeg(rgb), set()),
    }


def broken_images() -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, words that the error must contain). None is a complete image."""
    jpeg = as_jpeg(scene())
    png = saved(Image.fromarray(scene()), "PNG")
    return {
        "empty.JPEG": (b"", "empty"),
        "text.JPEG": (b"<html>404 Not Found</html>", "not an image"),
        "truncated.JPEG": (jpeg[: len(jpeg) // 2], "truncated"),
        "header_only.JPEG": (jpeg[:30], "header"),
        "cut_end.JPEG": (jpeg[:-400], "truncated"),
        "truncated.png": (png[: len(png) // 2], "decoded"),
        "animation.gif": (animated_gif(), "animation"),
        "huge.png": (huge_png(), "pixels"),
        "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    }


def pillow_rgb(data: bytes) -> np.ndarray:
    """Pillow's RGB pixels, as torchvision's loader sees them, uint8 [height, width, 3]; but 16-bit
    gray is divided by 257."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))
