"""What the docstrings of estimators have in common."""

import inspect
from typing import TypeVar

_T = TypeVar("_T", bound=type)

_BLOCKS = {
    "{metric parameters}": """
        metric : "covariance", array, or MahalanobisMetric, default "covariance"
            As in :class:`MahalanobisNeighbors`.
        ridge, shrinkage : float, default 0.0
            How the covariance is regularised, as in
            :meth:`MahalanobisMetric.from_data`.
        """,
    "{index parameters}": """
        index_mode : Exact, Filter or None, default None
            How the index answers; None picks by cost.
        """,
    "{index attributes}": """
        index_ : MahalanobisIndex
            The points; ``index_.update_metric(a, b)`` changes the metric in place.
        n_samples_fit_ : int
            How many points there are.
        n_features_in_ : int
            How many features they have.
        """,
    "{run parameters}": """
        progress : bool, default False
            Whether to show the steps, with rich where it is installed.
        random_state : int, RandomState instance or None, default None
            Where the first centres come from.
        """,
    "{clustering attributes}": """
        n_iter_ : int
            Steps of the best start.
        n_distinct_ : int
            Clusters that have a row: less than ``n_clusters`` where rows are of fewer
            different places.
        metric_ : MahalanobisMetric
            The metric.
        """,
}


def documented(estimator: _T) -> _T:
    """Fill the common parameters and attributes into the docstring of a class."""
    # python -OO leaves no docstrings
    if estimator.__doc__ is not None:
        text = inspect.cleandoc(estimator.__doc__) + "\n"
        for name, block in _BLOCKS.items():
            text = text.replace(name, inspect.cleandoc(block))
        estimator.__doc__ = text
    return estimator
