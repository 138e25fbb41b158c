"""Keyed random numbers: a draw is a hash of (seed, epoch, sample index, stream, counter).

The same key gives the same number in any thread, any process, any order and after any resume; that
is what makes a batch equal for every worker count and rank count. numba's own generator cannot do
this: it keeps one hidden state per thread, seeded from entropy.

Each number exists twice: `uniform` is for numba kernels (scalars in, scalar out, cached on disk),
`uniform_array` is numpy (arrays broadcast). Hash, integers and uniforms are bit-identical between
the two; normals agree to 1e-12 (two libraries' log and cos). `mix` is the one definition of the
hash for both; `mix_int64` is the same for torch, which has no arithmetic on uint64.

Source: splitmix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014 (with David Stafford's variant-13 constants), applied once per key word.
"""

import math
import zlib
from typing import Any

import numpy as np

from fast_imagenet.kernel_cache import cached_njit

# One number per purpose. Two operations that share a stream draw equal numbers, so append here and
# never reuse or renumber: a changed number silently changes every resumed or repeated run.
STREAM_CROP = 1
STREAM_FLIP = 2
STREAM_POLICY = 3
STREAM_MAGNITUDE = 4
STREAM_SIGN = 5
STREAM_JITTER = 6
STREAM_JITTER_ORDER = 7
STREAM_GRAYSCALE = 8
STREAM_SOLARIZE = 9
STREAM_BLUR = 10
STREAM_ERASING = 11
STREAM_ERASING_NOISE = 12
STREAM_MIX = 13
STREAM_ORDER = 14
STREAM_NETWORK = 15

# Where an epoch has a sample several times, i + k * COPY keys the draws of sample i, copy k.
COPY = 1 << 40

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
GAMMA_INT64, _MIX_1_INT64, _MIX_2_INT64 = (
    int(word.astype(np.int64)) for word in (_GAMMA, _MIX_1, _MIX_2)
)
_U11, _U27, _U30, _U31, _U32 = (np.uint64(bits) for bits in (11, 27, 30, 31, 32))
_TO_DOUBLE = 2.0**-53
_TWO_PI = 2.0 * math.pi


def stream_of(name: str) -> int:
    """The stream of an operation that has no number above, from its name."""
    return 1 << 32 | zlib.crc32(name.encode())


def mix(word: Any) -> Any:
    """splitmix64's finalizer, uint64 [...] to uint64 [...]; `_mix` is the same for kernels."""
    word = (word ^ (word >> _U30)) * _MIX_1
    word = (word ^ (word >> _U27)) * _MIX_2
    return word ^ (word >> _U31)


def mix_int64(word: Any) -> Any:
    """`mix` for the int64 tensors of torch, whose products wrap alike."""
    word = (word ^ shift_int64(word, 30)) * _MIX_1_INT64
    word = (word ^ shift_int64(word, 27)) * _MIX_2_INT64
    return word ^ shift_int64(word, 31)


def shift_int64(word: Any, bits: int) -> Any:
    """Shift right, zeros coming in: the shift of int64 repeats the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


_mix = cached_njit(inline="always")(mix)


@cached_njit(nogil=True)
def hash_key(seed, epoch, sample, stream, counter):
    """Hash five integers to 64 well-mixed bits.

    Args: seed, epoch, sample (index in the dataset), stream (a STREAM_ constant), counter (0, 1,
        2 ... when one purpose needs several numbers): integers, taken modulo 2**64.
    Returns: uint64, uniform over [0, 2**64).
    """
    word = _mix(np.uint64(seed) + _GAMMA)
    word = _mix((word ^ np.uint64(epoch)) + _GAMMA)
    word = _mix((word ^ np.uint64(sample)) + _GAMMA)
    word = _mix((word ^ np.uint64(stream)) + _GAMMA)
    return _mix((word ^ np.uint64(counter)) + _GAMMA)


@cached_njit(nogil=True)
def uniform(seed, epoch, sample, stream, counter):
    """A float64 in [0, 1) with 53 random bits. Arguments as `hash_key`."""
    return np.float64(hash_key(seed, epoch, sample, stream, counter) >> _U11) * _TO_DOUBLE


@cached_njit(nogil=True)
def integer(low, high, seed, epoch, sample, stream, counter):
    """An int64 in [low, high), high excluded. Arguments as `hash_key`.

    `high - low` must lie in [1, 2**32); the bias of any value is below 2**-32.
    """
    span = np.uint64(high - low)
    top = hash_key(seed, epoch, sample, stream, counter) >> _U32
    return np.int64(low) + np.int64((top * span) >> _U32)


@cached_njit(nogil=True)
def normal(seed, epoch, sample, stream, counter):
    """A float64 from N(0, 1) (Box-Muller on one key; |value| <= 8.6). Arguments as `hash_key`."""
    first = hash_key(seed, epoch, sample, stream, counter)
    second = _mix(first + _GAMMA)
    # 1 - u lies in (0, 1]: log(0) cannot happen.
    radius = math.sqrt(-2.0 * math.log(1.0 - np.float64(first >> _U11) * _TO_DOUBLE))
    return radius * math.cos(_TWO_PI * (np.float64(second >> _U11) * _TO_DOUBLE))


def step_seed(seed: int, rank: int, step: int) -> int:
    """Seed of torch's own generator for one step of one rank: what stochastic depth draws from."""
    return int(hash_key(seed, step, rank, STREAM_NETWORK, 0))


def _words(value: Any) -> np.ndarray:
    """Integers of any sign as uint64 arrays (modulo 2**64); never 0-d, those warn on wrapping."""
    if isinstance(value, int):
        value = np.array([value & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return np.atleast_1d(np.asarray(value)).astype(np.uint64)


def _unit(words: np.ndarray) -> np.ndarray:
    return (words >> _U11).astype(np.float64) * _TO_DOUBLE


def hash_array(seed: Any, epoch: Any, sample: Any, stream: Any, counter: Any = 0) -> np.ndarray:
    """`hash_key` for numpy arrays (broadcasting, at least 1-d). Returns uint64 [...]."""
    return mix((prefix_array(seed, epoch, sample, stream) ^ _words(counter)) + _GAMMA)


def prefix_array(seed: Any, epoch: Any, sample: Any, stream: Any) -> np.ndarray:
    """`hash_array` before the counter enters, uint64 [...]: for code that adds many counters."""
    words = mix(_words(seed) + _GAMMA)
    for part in (epoch, sample, stream):
        words = mix((words ^ _words(part)) + _GAMMA)
    return words


def uniform_array(seed: Any, epoch: Any, sample: Any, stream: Any, counter: Any = 0) -> np.ndarray:
    """`uniform` for numpy arrays (broadcasting). Returns float64 [...] in [0, 1)."""
    return _unit(hash_array(seed, epoch, sample, stream, counter))


def index_of(keys: Any) -> Any:
    """The places in the file of samples that have such keys, int64 [...]."""
    return keys & (COPY - 1)


def alternating_flips(seed: int, epoch: int, keys: np.ndarray) -> np.ndarray:
    """Whether images are mirrored, bool [b]: a coin per sample, turned by every epoch and copy.

    Args: seed, epoch: of the run. keys: int64 [b].
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), section
        3.6, there without copies.
    """
    coins = uniform_array(seed, 0, index_of(keys), STREAM_FLIP) < 0.5
    return coins ^ ((epoch + keys // COPY) % 2 == 1)


def integer_array(
    low: int, high: int, seed: Any, epoch: Any, sample: Any, stream: Any, counter: Any = 0
) -> np.ndarray:
    """`integer` for numpy arrays (broadcasting). Returns int64 [...] in [low, high).

    Raises: ValueError when the range is empty or wider than 2**32 - 1.
    """
    span = int(high) - int(low)
    if not 1 <= span < 2**32:
        raise ValueError(f"integers in [{low}, {high}): the range must hold 1 to 2**32 - 1 values")
    top = hash_array(seed, epoch, sample, stream, counter) >> _U32
    return np.int64(low) + ((top * np.uint64(span)) >> _U32).astype(np.int64)


def normal_array(seed: Any, epoch: Any, sample: Any, stream: Any, counter: Any = 0) -> np.ndarray:
    """`normal` for numpy arrays (broadcasting). Returns float64 [...], equal to 1e-12."""
    first = hash_array(seed, epoch, sample, stream, counter)
    second = mix(first + _GAMMA)
    return np.sqrt(-2.0 * np.log(1.0 - _unit(first))) * np.cos(_TWO_PI * _unit(second))
