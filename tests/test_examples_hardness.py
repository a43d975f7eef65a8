"""The example of gradients: derivatives, their sums, and what the sums decide."""

import pytest

from lowerbounds import orthogonal_vectors

EXAMPLE = "gradient_hardness"


@pytest.fixture
def made(example):
    return example.inputs_of(orthogonal_vectors(8, 30, rng=0))


def test_the_slope_is_the_derivative_of_the_squared_norm(example, made):
    step = 1e-5
    for factor in (0.05, 0.3, 1.0):
        ends = [example.squared_norm(made, factor + t * step) for t in (-1, 1)]
        difference = (ends[1] - ends[0]) / (2 * step)
        # outputs go from 1 to 0 as weights shift: rounding alone is 1e-16 / step
        assert example.slope(made, factor) == pytest.approx(
            difference, rel=1e-5, abs=1e-9
        )


def test_sums_of_derivatives_converge(example, made):
    truth = example.squared_norm(made, 1.0) - example.squared_norm(made, 0.0)
    coarse, fine = (abs(example.rise(made, m) - truth) for m in (128, 512))
    assert fine < coarse / 8
    assert fine < 0.05


@pytest.mark.parametrize("planted", [False, True])
def test_the_squared_norm_tells_the_answer(example, planted):
    for seed in range(5):
        instance = orthogonal_vectors(16, 44, planted=planted, rng=seed)
        norm = example.squared_norm(example.inputs_of(instance), 1.0)
        assert (norm > 0.9) if planted else (norm < 0.1)


@pytest.mark.slow
def test_gradients_decide_every_instance(example, capsys):
    assert example.main() == 0
    assert "10 of 10" in capsys.readouterr().out
