"""Changes of coordinates leave the logits where they were, up to known terms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.problem.transforms import balance, center
from tests.pairwise import pairwise


def logits_by(transform, query, key, scale):
    """The logits put together from a transform's coordinates and known terms."""
    u = (query - transform.query_center) @ transform.query_map
    centred = key - transform.key_center
    v = centred @ transform.key_map
    known = (centred @ transform.tilt)[None, :]
    return u @ v.T + known + scale * (query @ transform.key_center)[:, None]


def clouds(kind, rng, n=60, m=80, d=5):
    query, key = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    if kind == "rank-deficient":
        key[:, 3:] = key[:, :2] @ rng.standard_normal((2, 2))
        query[:, 0] = 0
    elif kind == "constant keys":
        key[:] = key[0]
    elif kind == "constant queries":
        query[:] = query[0]
    elif kind == "all constant":
        query[:], key[:] = query[0], key[0]
    elif kind == "zeros":
        query[:], key[:] = 0, 0
    elif kind == "one row":
        query, key = query[:1], key[:1]
    elif kind == "along a line":
        key = key[:, :1] * np.ones(d)
    elif kind == "far away":
        query, key = query + 1e3, key - 1e3
    elif kind == "anisotropic":
        query *= 10.0 ** np.arange(d)
        key *= 10.0 ** -np.arange(d)
    return query, key


KINDS = [
    "plain",
    "rank-deficient",
    "constant keys",
    "constant queries",
    "all constant",
    "zeros",
    "one row",
    "along a line",
    "far away",
    "anisotropic",
]


@pairwise(
    "kind, scale, queries, make",
    KINDS,
    [0.25, 1.0, -0.5, 0.0],
    [False, True],
    [center, balance],
)
def test_logits_stay(kind, scale, queries, make):
    query, key = clouds(kind, np.random.default_rng(0))
    transform = make(query, key, scale, queries=queries)
    got = logits_by(transform, query, key, scale)
    want = scale * (query @ key.T)
    # inverse factors are at most 1e5 times as large as the rows they whiten
    size = abs(scale) * np.abs(query).max() * np.abs(key).max() + 1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("kind", ["plain", "far away", "anisotropic"])
def test_balanced_sides_have_one_diagonal_covariance(kind, queries):
    query, key = clouds(kind, np.random.default_rng(1))
    t = balance(query, key, 0.7, queries=queries)
    for rows, origin, side in [
        (query, t.query_center, t.query_map),
        (key, t.key_center, t.key_map),
    ]:
        moved = (rows - origin) @ side
        covariance = moved.T @ moved / len(moved)
        np.testing.assert_allclose(
            covariance, np.diag(t.scales), atol=1e-6 * t.scales[0]
        )
    assert np.all(np.diff(t.scales) <= 0)


@given(
    d=st.integers(1, 6),
    scale=st.sampled_from([0.3, -2.0]),
    seed=st.integers(0, 2**32 - 1),
    queries=st.booleans(),
)
def test_maps_undo_each_other(d, scale, seed, queries):
    query, key = np.random.default_rng(seed).standard_normal((2, 40, d))
    t = balance(query, key, scale, queries=queries)
    product = t.query_map @ t.key_map.T
    np.testing.assert_allclose(product, scale * np.eye(d), atol=1e-9 * abs(scale))


@pytest.mark.parametrize("make", [center, balance])
def test_centring_the_queries_is_a_choice(make):
    query, key = clouds("far away", np.random.default_rng(2))
    without = make(query, key, 0.5, queries=False)
    np.testing.assert_array_equal(without.query_center, 0)
    np.testing.assert_array_equal(without.tilt, 0)
    with_it = make(query, key, 0.5, queries=True)
    np.testing.assert_allclose(with_it.query_center, query.mean(axis=0))
