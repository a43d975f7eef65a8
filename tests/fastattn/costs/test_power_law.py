"""Power laws through points: exact where the points lie on one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.costs.power_law import PowerLaw

POSITIVE = st.floats(1e-6, 1e6)
EXPONENTS = st.floats(0.1, 3) | st.floats(-3, -0.1)


@given(x=POSITIVE, y=POSITIVE, exponent=EXPONENTS, factor=st.floats(1.1, 100))
def test_two_points_of_a_law_give_it_back(x, y, exponent, factor):
    law = PowerLaw(x, y, exponent)
    other = law.value(factor * x)
    assert law.solve(other) == pytest.approx(factor * x, rel=1e-9)
    found = PowerLaw.fit((x, y), (factor * x, other))
    assert found.exponent == pytest.approx(exponent, rel=1e-9)
    assert found.value(x) == pytest.approx(y, rel=1e-9)


def test_exponents_are_clipped_after_they_are_made_steeper():
    points = (1.0, 1.0), (10.0, 0.1)
    assert PowerLaw.fit(*points, steeper=2.0).exponent == pytest.approx(-2)
    assert PowerLaw.fit(*points, steeper=2.0, least=-1.5).exponent == -1.5
    assert PowerLaw.fit((1.0, 1.0), (10.0, 1.0), most=-0.1).solve(0.5) == 10240
