"""Inner products of vectors of bits, 64 bits to a word."""

import numpy as np

from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit

# pairs of words between two interrupts: a few hundredths of a second
_WORDS = 1 << 25


def extremes(left, right):
    found = np.empty((2, 2, len(left)), dtype=np.int64)
    left, right = _words(left), _words(right)
    step = max(1, _WORDS // right.size)

    def work(start):
        rows = slice(start, start + step)
        _extremes(left[rows], right, found[:, :, rows])

    run_blocks(work, range(0, len(left), step))
    first = found[0, 0].argmin(), found[1, 0].argmax()
    return np.array(
        [(found[s, 0, i], i, found[s, 1, i]) for s, i in enumerate(first)],
        dtype=np.int64,
    )


def _words(packed):
    return np.ascontiguousarray(packed).view(np.uint64)


@njit(nogil=True, cache=True, error_model="numpy")
def _extremes(left, right, found):
    # found[0] has the least product of each row and its position, found[1] the largest
    for i in range(left.shape[0]):
        least, largest, low, high = 64 * left.shape[1] + 1, -1, 0, 0
        for j in range(right.shape[0]):
            product = 0
            for t in range(left.shape[1]):
                product += _ones(left[i, t] & right[j, t])
            if product < least:
                least, low = product, j
            if product > largest:
                largest, high = product, j
        found[0, 0, i], found[0, 1, i] = least, low
        found[1, 0, i], found[1, 1, i] = largest, high


@njit(nogil=True, cache=True, error_model="numpy")
def _ones(word):
    # LLVM recognises this sum, and emits the processor's popcount instruction
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    two = np.uint64(0x3333333333333333)
    word = (word & two) + ((word >> np.uint64(2)) & two)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))
