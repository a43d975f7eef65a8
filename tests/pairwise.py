"""Parameters whose values all meet in pairs, not in every combination."""

import pytest
from allpairspy import AllPairs


def pairwise(names, *values):
    """Parametrize a test so that any two values of two parameters meet in a case.

    For factors that hardly interact: a fault that needs three values at once may be
    missed.
    """
    rows = AllPairs([list(x) for x in values])
    return pytest.mark.parametrize(names, [tuple(row) for row in rows])
