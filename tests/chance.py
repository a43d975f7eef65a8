"""Assertions for bounds that hold with a probability."""

import numpy as np
from scipy.stats import binom


def allowed_failures(failure, trials, false_alarm=1e-9):
    """The most failures that bounds with probability ``failure`` plausibly show."""
    return int(binom.isf(false_alarm, trials, failure))


def assert_fails_rarely(
    trial, *, failure, trials=200, false_alarm=1e-9, seed=0, answers=None
):
    """Assert that ``trial(rng)`` is true except with probability ``failure``.

    It is None where an answer was refused: there must be so many ``answers``, one to a
    trial by default, and what is allowed goes by their number.
    """
    streams = np.random.default_rng(seed).spawn(trials)
    outcomes = [trial(rng) for rng in streams]
    answered = [bool(x) for x in outcomes if x is not None]
    wanted = trials if answers is None else answers
    assert len(answered) >= wanted, (
        f"{len(answered)} of {trials} were answered, expected at least {wanted}"
    )
    failures = answered.count(False)
    allowed = allowed_failures(failure, len(answered), false_alarm) if answered else 0
    assert failures <= allowed, (
        f"{failures} of {len(answered)} failed; {failure:.3g} allows {allowed}"
    )
