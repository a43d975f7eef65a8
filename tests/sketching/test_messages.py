"""Errors call an argument by the name that the caller knows."""

import numpy as np
import pytest
import scipy.sparse

import fastattn
from sketching import (
    Exact,
    MahalanobisIndex,
    MahalanobisKMeans,
    MahalanobisKMedians,
    MahalanobisKNeighborsTransformer,
    MahalanobisMetric,
    MahalanobisNeighbors,
)

X = np.random.default_rng(0).standard_normal((20, 3))
SPARSE = scipy.sparse.csr_matrix(X)
LARGE = (X * 1e25).astype(np.float32)


def index():
    made = MahalanobisIndex(MahalanobisMetric(np.eye(3)), mode=Exact())
    made.insert(X)
    return made


@pytest.mark.parametrize("kind", [MahalanobisNeighbors, MahalanobisKMeans])
@pytest.mark.parametrize(
    ("metric", "got"),
    [
        (None, "NoneType"),
        (np.ones(3), r"shape \(3,\); numpy.diag makes"),
        ([["a", "b"]], "list"),
        (3.0, r"shape \(\)"),
        (np.ones((1, 2, 3)), r"shape \(1, 2, 3\)"),
    ],
)
def test_a_metric_that_is_none_is_named(kind, metric, got):
    with pytest.raises(ValueError, match=f"metric: expected 'covariance', .*got {got}"):
        kind(metric=metric).fit(X)


def test_a_metric_with_nan_is_named():
    with pytest.raises(ValueError, match="metric: expected finite numbers"):
        MahalanobisNeighbors(metric=np.full((3, 3), np.nan)).fit(X)


@pytest.mark.parametrize("kind", [MahalanobisKMeans, MahalanobisKMedians])
@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (lambda *_: X[:2], TypeError, "init: expected 'k-means.*got function"),
        (X[:2] * np.nan, ValueError, "^init: expected finite numbers"),
        (X[:3], ValueError, r"^init: expected shape \(2, 3\)"),
        (None, TypeError, "^init: .*got NoneType"),
    ],
)
def test_first_centres_are_named(kind, init, error, message):
    with pytest.raises(error, match=message):
        kind(2, init=init).fit(X)


@pytest.mark.parametrize(
    "call",
    [
        lambda: index().insert(SPARSE),
        lambda: index().kneighbors(SPARSE, 2),
        lambda: MahalanobisMetric(np.eye(3)).whiten(SPARSE),
        lambda: MahalanobisMetric.from_matrix(scipy.sparse.eye(3)),
        lambda: fastattn.attention(SPARSE, X, X),
    ],
)
def test_sparse_matrices_are_called_so(call):
    with pytest.raises(
        TypeError, match=r"sparse (csr|dia|coo)_matrix: convert.*toarray"
    ):
        call()


@pytest.mark.parametrize("kind", [MahalanobisKMeans, MahalanobisKMedians])
def test_squares_that_overflow_are_said_to(kind):
    with pytest.raises(ValueError, match="X: squared distances overflow float32"):
        kind(2, metric=np.eye(3)).fit(LARGE)
    model = kind(2, metric=np.eye(3), random_state=0).fit(X.astype(np.float32))
    for call in (model.predict, model.transform, model.score):
        with pytest.raises(ValueError, match="X: squared distances overflow float32"):
            call(LARGE)
    assert kind(2, metric=np.eye(3)).fit(LARGE.astype(np.float64)).inertia_ > 0


def test_saving_into_a_folder_that_is_missing_names_the_file(tmp_path):
    path = tmp_path / "none" / "x.npz"
    with pytest.raises(
        FileNotFoundError, match=r"x\.npz: there is no folder"
    ) as caught:
        index().save(path)
    assert ".tmp" not in str(caught.value)


def test_the_graph_is_symmetric_where_the_docstring_says_so():
    doc = MahalanobisKNeighborsTransformer.__doc__
    graph = MahalanobisKNeighborsTransformer(n_neighbors=4).fit_transform(X)
    assert abs(graph - graph.T).max() > 0
    assert "not symmetric" in " ".join(doc.split())
    assert "G.maximum(G.T)" in doc
    assert abs(graph.maximum(graph.T) - graph.T.maximum(graph)).max() == 0
