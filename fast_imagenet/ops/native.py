"""The only file that reaches C: libturbojpeg, two functions of libc, and memory by address.

Kernels name C functions through `numba.types.ExternalFunction`, so that they can be cached on disk
(a kernel that holds a ctypes pointer never is). The addresses behind the names are registered when
this file is imported; the names carry a prefix, so that a second libturbojpeg in the process (FFCV
links one, conda brings one) cannot be taken by mistake.

Reads and writes below go through plain addresses and check nothing: a kernel that uses them checks
its own bounds. They are needed besides speed: FFCV marks numba's one-dimensional uint8 array type
read-only for the whole process as soon as a Loader exists.
"""

import ctypes
import ctypes.util
import glob
import os
import sys
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

PIXELS_RGB = 0  # TJPF_RGB
ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT: the transform every other decoder uses by default

_LIBRARY_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


def _library_candidates() -> list[str]:
    """Paths and names to try, the active environment before the system."""
    prefixes = [os.environ.get("CONDA_PREFIX", ""), sys.prefix]
    folders = [os.path.join(prefix, "lib") for prefix in dict.fromkeys(prefixes) if prefix]
    paths = [
        path
        for folder in (*folders, *_LIBRARY_FOLDERS)
        for path in sorted(glob.glob(os.path.join(folder, "libturbojpeg.so*")), key=len)
    ]
    named = ctypes.util.find_library("turbojpeg")
    return [*paths, *([named] if named else []), "libturbojpeg.so.0"]


def load_turbojpeg() -> ctypes.CDLL:
    """Open libturbojpeg (2.0 or newer; 2.1 is what Debian 12 and Ubuntu 22.04 have).

    Raises: ImportError naming the package to install, when no usable library is found.
    """
    tried = []
    for candidate in _library_candidates():
        try:
            library = ctypes.CDLL(candidate)
            library.tjGetErrorCode  # noqa: B018  absent before 2.0
            return library
        except (OSError, AttributeError) as error:
            tried.append(f"{candidate} ({error})")
    raise ImportError(
        "libturbojpeg 2.0 or newer was not found; install it with "
        "`apt-get install libturbojpeg0-dev` or `conda install -c conda-forge libjpeg-turbo`. "
        "Tried: " + "; ".join(tried)
    )


_turbojpeg = load_turbojpeg()
_turbojpeg.tjInitDecompress.restype = ctypes.c_void_p
_turbojpeg.tjDestroy.argtypes = [ctypes.c_void_p]
_turbojpeg.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
_turbojpeg.tjGetErrorStr2.restype = ctypes.c_char_p
_libc = ctypes.CDLL(None)


def _function(
    library: ctypes.CDLL, name: str, result: Any, *arguments: Any
) -> types.ExternalFunction:
    symbol = f"fast_imagenet_{name}"
    llvm.add_symbol(symbol, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, result(*arguments))


# int tjDecompress2(handle, jpeg, size, pixels, width, pitch, height, pixelFormat, flags)
_INT, _SIZE, _ADDRESS = types.int32, types.uint64, types.uintp
tj_decompress = _function(
    *(_turbojpeg, "tjDecompress2", _INT, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS),
    *(_INT, _INT, _INT, _INT, _INT),
)
tj_error_code = _function(_turbojpeg, "tjGetErrorCode", _INT, _ADDRESS)
memchr = _function(_libc, "memchr", _ADDRESS, _ADDRESS, _INT, _SIZE)
memcpy = _function(_libc, "memcpy", _ADDRESS, _ADDRESS, _ADDRESS, _SIZE)


def new_decoder() -> int:
    """A TurboJPEG decompressor handle. One per thread: it is not safe to share."""
    handle = _turbojpeg.tjInitDecompress()
    if not handle:
        raise MemoryError("libturbojpeg could not allocate a decompressor")
    return handle


def free_decoder(handle: int) -> None:
    """Give back a handle from `new_decoder`."""
    _turbojpeg.tjDestroy(handle)


def decoder_message(handle: int) -> str:
    """What libturbojpeg said about the last failure on this handle."""
    return _turbojpeg.tjGetErrorStr2(handle).decode(errors="replace")


@intrinsic
def load_byte(typing_context, address):
    """uint8 at an address (uintp)."""

    def generate(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()))

    return types.uint8(types.uintp), generate


@intrinsic
def store_byte(typing_context, address, value):
    """Write a uint8 to an address (uintp)."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint8), generate


@intrinsic
def load_bits(typing_context, address):
    """Eight bytes at any address (uintp) as a uint64, the first byte highest."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.bswap(builder.load(place, align=1))

    return types.uint64(types.uintp), generate


@intrinsic
def load_int32(typing_context, address):
    """int32 at an address (uintp), as int64."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        return builder.sext(builder.load(place), ir.IntType(64))

    return types.int64(types.uintp), generate


@intrinsic
def store_int32(typing_context, address, value):
    """Write an int64's low half to an address (uintp)."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        builder.store(builder.trunc(arguments[1], ir.IntType(32)), place)
        return context.get_dummy_value()

    return types.void(types.uintp, types.int64), generate


@intrinsic
def as_pointer(typing_context, address):
    """An address (uintp) as a void pointer, for `numba.carray`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), generate


_FLOAT, _QUARTET = ir.FloatType(), ir.VectorType(ir.FloatType(), 4)
_LANES = ir.VectorType(_FLOAT, 8)  # R, G, B and one unused, of each of two rows


def _product(builder, rows, weights, step):
    """Neighbour `step` (an integer value) of both rows times its weight."""
    quartets = []
    for row in rows:
        pixel = builder.add(row, builder.mul(step, step.type(12)))
        quartets.append(builder.load(builder.inttoptr(pixel, _QUARTET.as_pointer()), align=4))
    tap = builder.add(weights, builder.mul(step, step.type(4)))
    colors = builder.shuffle_vector(*quartets, _numbers(range(8)))
    weight = builder.load(builder.inttoptr(tap, _FLOAT.as_pointer()), align=4)
    return builder.fmul(colors, _splat(builder, weight), flags=("contract",))


def _numbers(values):
    values = list(values)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(values)), values)


def _unrolled_sum(builder, rows, weights, taps):
    """The sum over a fixed number of taps, in two chains that do not wait for each other."""
    totals = []
    for k in range(taps):
        product = _product(builder, rows, weights, weights.type(k))
        if k < 2:
            totals.append(product)
        else:
            totals[k % 2] = builder.fadd(totals[k % 2], product, flags=("contract",))
    return builder.fadd(*totals)


def _weighted_sum(builder, rows, weights, pairs):
    """A loop over pairs of taps with two vectors of sums."""
    totals = [cgutils.alloca_once(builder, _LANES) for _ in range(2)]
    for total in totals:
        builder.store(ir.Constant(_LANES, [0.0] * 8), total)
    with cgutils.for_range(builder, pairs) as loop:
        for k, total in enumerate(totals):
            step = builder.add(builder.mul(loop.index, loop.index.type(2)), loop.index.type(k))
            product = _product(builder, rows, weights, step)
            new = builder.fadd(builder.load(total), product, flags=("contract",))
            builder.store(new, total)
    return builder.fadd(*[builder.load(total) for total in totals])


def _splat(builder, scalar):
    lanes = ir.VectorType(scalar.type, 8)
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), _numbers([0] * 8))


def _to_bytes(builder, sums):
    """Round to nearest, clip to 0..255, narrow to uint8 (floor(x + 0.5), x >= -0.5 after clip)."""
    integers = ir.VectorType(ir.IntType(32), 8)
    rounded = builder.fadd(sums, ir.Constant(_LANES, [0.5] * 8))
    whole = builder.fptosi(rounded, integers)
    low, high = ir.Constant(integers, [0] * 8), ir.Constant(integers, [255] * 8)
    whole = builder.select(builder.icmp_signed("<", whole, low), low, whole)
    whole = builder.select(builder.icmp_signed(">", whole, high), high, whole)
    return builder.trunc(whole, ir.VectorType(ir.IntType(8), 8))


def _weigher(taps):
    """An intrinsic that weighs a fixed number of taps (0: any even number), unrolled."""

    @intrinsic
    def weigh_pixels(typing_context, row, other_row, weights, pairs, pixel, other_pixel):
        """Write an RGB pixel of two rows: the weighted sum of 2 * `pairs` neighbours in its row.

        Args: row, other_row: addresses of the first neighbours, three float32 each, readable four
            bytes beyond the last. weights: address of 2 * `pairs` float32, for both rows. pixel,
            other_pixel: addresses of the results, three uint8, rounded to nearest and clipped; a
            fourth byte behind them is overwritten.
        Source of the shape: the four-lane inner loop of SIMD image resizers, here for two rows at a
            time; written as LLVM vectors, because the compiler does not find it in scalar code.
        """

        def generate(context, builder, signature, arguments):
            rows, pixels = arguments[:2], arguments[4:]
            weights, pairs = arguments[2:4]
            if taps:
                sums = _unrolled_sum(builder, rows, weights, taps)
            else:
                sums = _weighted_sum(builder, rows, weights, pairs)
            byte_vector = _to_bytes(builder, sums)
            for k, pixel in enumerate(pixels):
                four = builder.shuffle_vector(
                    byte_vector, byte_vector, _numbers(range(4 * k, 4 * k + 4))
                )
                target = builder.inttoptr(pixel, four.type.as_pointer())
                builder.store(four, target, align=1)
            return context.get_dummy_value()

        places, count = [types.uintp] * 3, types.int64
        return types.void(*places, count, types.uintp, types.uintp), generate

    return weigh_pixels


weigh_2, weigh_4, weigh_6, weigh_any = _weigher(2), _weigher(4), _weigher(6), _weigher(0)
