"""An op runs the kernel of the place where its arrays are."""

import numpy as np
import pytest

from fastattn._ops.monomials import monomials
from sketching._lib.op import Op, op


@op()
def double(x, *, times=2):
    """Multiply."""
    return x * times


def test_an_op_without_places_runs_its_reference(xp):
    assert isinstance(double(xp.asarray(np.ones(2))), xp.array_type)
    assert float(np.asarray(double(np.ones(1), times=5))[0]) == 5


def test_an_op_looks_like_its_reference():
    assert isinstance(double, Op)
    assert double.__name__ == "double"
    assert double.__doc__ == "Multiply."
    assert double.reference.__name__ == "double"


@pytest.mark.parametrize("place", [None, "moon"])
def test_an_undeclared_place_gets_the_reference(place):
    assert monomials.kernel(place) is monomials.reference


def test_a_declared_place_gets_the_kernel_of_the_same_name():
    kernel = monomials.kernel("cpu")
    assert kernel is not monomials.reference
    assert (kernel.__name__, kernel.__module__) == (
        "monomials",
        "fastattn._ops.cpu.monomials",
    )


def test_a_declared_kernel_that_is_missing_raises():
    broken = Op(double.reference, ("nowhere",))
    with pytest.raises(ModuleNotFoundError):
        broken.kernel("nowhere")
