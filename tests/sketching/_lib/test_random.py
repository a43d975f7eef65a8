"""One generator at the boundary, from whatever NumPy takes."""

import numpy as np
import pytest

from sketching._lib.random import as_generator


@pytest.mark.parametrize(
    "source", [5, np.int64(5), np.random.SeedSequence(5), np.random.PCG64(5)]
)
def test_a_seed_gives_one_stream(source):
    want = np.random.default_rng(5).random(4)
    np.testing.assert_array_equal(as_generator(source).random(4), want)


def test_a_generator_goes_on():
    rng = np.random.default_rng(0)
    assert as_generator(rng) is rng


def test_none_is_fresh_every_time():
    assert as_generator(None).random() != as_generator(None).random()


@pytest.mark.parametrize("source", [5, None, np.random.default_rng(1)])
def test_every_generator_can_spawn(source):
    first, second = as_generator(source).spawn(2)
    assert first.random() != second.random()


@pytest.mark.parametrize("bad", ["a", -1, 0.5, object()])
def test_anything_else_is_named(bad):
    with pytest.raises(TypeError, match="rng: expected an int >= 0, a numpy Generator"):
        as_generator(bad)


def test_a_generator_without_children_is_named():
    legacy = np.random.RandomState(0)
    for source in (legacy, np.random.Generator(legacy._bit_generator)):
        with pytest.raises(TypeError, match=r"rng: .* that can spawn or None"):
            as_generator(source)


def test_the_check_leaves_the_children_as_they_were():
    want = np.random.default_rng(5).spawn(1)[0].random()
    assert as_generator(5).spawn(1)[0].random() == want
