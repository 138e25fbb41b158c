"""Slow, obvious versions of what the package computes fast. Tests compare against these."""


# ==== Keyed random numbers ========================================================================


def hash_key(seed, epoch, sample, stream, counter):
    """splitmix64's finaliser once per key word, in Python's unbounded integers."""
    mask = 2**64 - 1
    word = 0
    for part in (seed, epoch, sample, stream, counter):
        word = ((word ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        word = word ^ (word >> 31)
    return word
