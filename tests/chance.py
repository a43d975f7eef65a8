"""Assertions for promises that hold with a probability."""

import numpy as np
from scipy.stats import binom


def allowed_failures(failure, trials, false_alarm=1e-9):
    """The most failures that a promise kept with ``failure`` can plausibly show."""
    return int(binom.isf(false_alarm, trials, failure))


def assert_fails_rarely(trial, *, failure, trials=200, false_alarm=1e-9, seed=0):
    """Assert that ``trial(rng)`` is true except with probability ``failure``."""
    streams = np.random.default_rng(seed).spawn(trials)
    failures = sum(not trial(rng) for rng in streams)
    allowed = allowed_failures(failure, trials, false_alarm)
    assert failures <= allowed, (
        f"{failures} of {trials} failed; {failure:.3g} allows {allowed}"
    )
