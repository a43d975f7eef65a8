"""Random streams: one generator at the boundary, children for every use."""

from typing import TypeAlias

import numpy as np

# whatever numpy.random.default_rng takes
RandomSource: TypeAlias = (
    int | np.random.Generator | np.random.SeedSequence | np.random.BitGenerator | None
)


def as_generator(rng: RandomSource) -> np.random.Generator:
    """Turn a seed, a generator or None into a generator.

    Numbers are always drawn on the host and then moved, so that a seed gives the
    same stream on every device.

    Raises
    ------
    TypeError
        If ``rng`` is none of these, or a generator that has no children.
    """
    try:
        generator = np.random.default_rng(rng)
        # a legacy seed, as in a RandomState, is refused here rather than later
        generator.spawn(0)
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            "rng: expected an int >= 0, a numpy Generator that can spawn or None, "
            f"got {rng!r}"
        ) from error
    return generator
