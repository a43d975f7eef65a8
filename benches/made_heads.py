"""Constructed heads whose errors are in few rows, which uniform samples of rows miss.

No kind depends on the random numbers of an answer. Each ``make(n, d, rng)`` returns
query, key and value of one head in float64, made for the default scale.
"""

from collections.abc import Callable, Iterator

import numpy as np

from benches.heads import Head

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
_KINDS: dict[str, Callable[..., Arrays]] = {}
# sizes of the heads of a kind, in turn
SIZES = ((2048, 32), (4096, 32), (4096, 64), (8192, 32), (2048, 64), (8192, 64))


def kind(make: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Register a kind of head under the name of its function."""
    _KINDS[make.__name__.replace("_", " ")] = make
    return make


def made_heads(each: int, first: int = 0) -> Iterator[tuple[str, Head]]:
    """Yield so many heads of every kind, with the name of the kind."""
    for number, (name, make) in enumerate(_KINDS.items()):
        for seed in range(first, first + each):
            n, d = SIZES[seed % len(SIZES)]
            rng = np.random.default_rng([number, seed])
            arrays = (np.ascontiguousarray(x, np.float32) for x in make(n, d, rng))
            yield name, Head(f"{name} {seed}", *arrays, d**-0.5)


def kinds() -> tuple[str, ...]:
    """Names of all kinds."""
    return tuple(_KINDS)


def _plain(n, d, rng) -> Arrays:
    """Diffuse Gaussian rows, into which the special rows of a kind are put."""
    query, key, value = rng.standard_normal((3, n, d))
    return 0.4 * query, 0.6 * key, value


def _few(n, count, rng) -> np.ndarray:
    return rng.choice(n, count, replace=False)


def _direction(d, rng) -> np.ndarray:
    e = rng.standard_normal(d)
    return e / np.linalg.norm(e)


@kind
def gaussian(n, d, rng):
    """Independent normal entries."""
    return _plain(n, d, rng)


@kind
def sharp_gaussian(n, d, rng):
    """Every row is peaked."""
    query, key, value = _plain(n, d, rng)
    return 5 * query, 2 * key, value


@kind
def student_entries(n, d, rng):
    """Student t entries of 2.5 degrees of freedom everywhere."""
    return tuple(c * rng.standard_t(2.5, (n, d)) for c in (0.4, 0.5, 1.0))


@kind
def student_queries(n, d, rng):
    """Heavy-tailed queries."""
    _, key, value = _plain(n, d, rng)
    return 0.4 * rng.standard_t(2.5, (n, d)), key, value


@kind
def student_keys(n, d, rng):
    """Heavy-tailed keys."""
    query, _, value = _plain(n, d, rng)
    return query, 0.5 * rng.standard_t(2.5, (n, d)), value


@kind
def student_values(n, d, rng):
    """Heavy-tailed values."""
    query, key, _ = _plain(n, d, rng)
    return query, key, rng.standard_t(2.5, (n, d))


@kind
def cauchy_values(n, d, rng):
    """Values with no mean."""
    query, key, _ = _plain(n, d, rng)
    return query, key, rng.standard_t(1, (n, d))


@kind
def laplace_entries(n, d, rng):
    """Exponential tails."""
    return tuple(rng.laplace(size=(n, d)) * c for c in (0.6, 0.6, 1.0))


@kind
def lognormal_query_norms(n, d, rng):
    """Queries whose norms span two orders."""
    query, key, value = _plain(n, d, rng)
    return query * rng.lognormal(0, 1, (n, 1)), key, value


@kind
def lognormal_key_norms(n, d, rng):
    """Keys whose norms span two orders."""
    query, key, value = _plain(n, d, rng)
    return query, key * rng.lognormal(0, 1, (n, 1)), value


@kind
def pareto_value_norms(n, d, rng):
    """Values whose norms have an infinite variance."""
    query, key, value = _plain(n, d, rng)
    return query, key, value * (rng.pareto(1.5, (n, 1)) + 1)


@kind
def special_first_tokens(n, d, rng):
    """Few first rows with large queries, keys and values."""
    query, key, value = _plain(n, d, rng)
    query[:3] *= 8
    key[:3] *= 5
    value[:3] *= 20
    return query, key, value


@kind
def special_last_tokens(n, d, rng):
    """Few last rows with large queries, keys and values."""
    query, key, value = _plain(n, d, rng)
    query[-4:] *= 8
    key[-4:] *= 4
    value[-4:] *= 10
    return query, key, value


@kind
def key_of_few_queries(n, d, rng):
    """One heavy key that six queries see and all other queries do not."""
    query, key, value = _plain(n, d, rng)
    e = _direction(d, rng)
    query -= np.outer(query @ e, e)
    key -= np.outer(key @ e, e)
    target = rng.integers(n)
    key[target] = 4 * e
    value[target] *= 15
    query[_few(n, 6, rng)] += 16 * e
    return query, key, value


@kind
def heavy_key_same_spread(n, d, rng):
    """Rows with a heavy key although the variance of their logits is ordinary."""
    query, key, value = _plain(n, d, rng)
    query[:, 0], key[:, 0] = -12, 0
    query[_few(n, 8, rng), 0] = 12
    target = rng.integers(n)
    key[target] = 0
    key[target, 0] = 5
    value[target] *= 3
    return query, key, value


@kind
def heavy_values(n, d, rng):
    """Three values a hundred times larger than the others."""
    query, key, value = _plain(n, d, rng)
    value[_few(n, 3, rng)] *= 100
    return query, key, value


@kind
def outlier_column(n, d, rng):
    """One column of queries and keys is far larger than the others."""
    query, key, value = _plain(n, d, rng)
    key[:, 3] = 8 + 2 * key[:, 3]
    query[:, 3] *= 6
    return query, key, value


@kind
def outlier_value_column(n, d, rng):
    """One column of values is far larger than the others."""
    query, key, value = _plain(n, d, rng)
    value[:, 5] = 30 + 4 * rng.standard_normal(n)
    return query, key, value


@kind
def two_scales_of_queries(n, d, rng):
    """One query in a hundred is much longer."""
    query, key, value = _plain(n, d, rng)
    query[_few(n, n // 100, rng)] *= 7
    return query, key, value


@kind
def two_scales_of_keys(n, d, rng):
    """One key in a hundred is much longer, its value larger."""
    query, key, value = _plain(n, d, rng)
    some = _few(n, n // 100, rng)
    key[some] *= 4
    value[some] *= 4
    return query, key, value


@kind
def huge_key_entry(n, d, rng):
    """One entry of one key takes the range of its column."""
    query, key, value = _plain(n, d, rng)
    key[rng.integers(n), rng.integers(d)] = 60
    return query, key, value


@kind
def huge_query_entry(n, d, rng):
    """Entries of few queries take the range of their rows."""
    query, key, value = _plain(n, d, rng)
    query[_few(n, 5, rng), rng.integers(d, size=5)] = 30
    return query, key, value


@kind
def rare_cluster(n, d, rng):
    """Twelve rows belong to a small cluster of keys that no other row sees."""
    query, key, value = _plain(n, d, rng)
    e = _direction(d, rng)
    some = _few(n, 12, rng)
    key -= np.outer(key @ e, e)
    key[some] += 6 * e
    value[some] = 6 * rng.standard_normal((12, d))
    query[_few(n, 12, rng)] += 8 * e
    return query, key, value


@kind
def attention_sink(n, d, rng):
    """Most rows put their weight on the first key, whose value is small."""
    query, key, value = _plain(n, d, rng)
    e = _direction(d, rng)
    key[0] = 6 * e
    value[0] *= 0.01
    query += 10 * e
    some = _few(n, max(4, n // 500), rng)
    query[some] = 6 * rng.standard_normal((len(some), d))
    return query, key, value


@kind
def needles(n, d, rng):
    """Nine rows copy one key each."""
    query, key, value = _plain(n, d, rng)
    rows, keys = _few(n, 9, rng), _few(n, 9, rng)
    key[keys] *= 2
    query[rows] = 3 * key[keys]
    value[keys] *= 4
    return query, key, value


@kind
def cancelling_values(n, d, rng):
    """Diffuse rows have tiny outputs: error and norm are in few peaked rows."""
    query, key, value = _plain(n, d, rng)
    query *= 0.3
    value[1::2] = -value[: n - n % 2 : 2][: len(value[1::2])]
    key[1::2] = key[: n - n % 2 : 2][: len(key[1::2])]
    key += 0.02 * rng.standard_normal(key.shape)
    query[_few(n, 10, rng)] *= 25
    return query, key, value


@kind
def growing_scale(n, d, rng):
    """Rows grow along the sequence."""
    query, key, value = _plain(n, d, rng)
    growth = np.geomspace(0.2, 5, n)[:, None]
    return query * growth, key, value * growth


@kind
def repeated_tokens(n, d, rng):
    """Forty tokens repeat, and seven rows are unlike all of them."""
    words = rng.integers(40, size=n)
    query, key, value = (x[words] for x in _plain(40, d, rng))
    some = _few(n, 7, rng)
    query[some] += 4 * rng.standard_normal((7, d))
    key[some] += 2 * rng.standard_normal((7, d))
    value[some] *= 8
    return 2 * query, key, value


@kind
def rare_direction(n, d, rng):
    """Rows span few dimensions but for a few rows, which lie in the remaining ones."""
    query, key, value = _plain(n, d, rng)
    query[:, 8:] *= 0.05
    key[:, 8:] *= 0.05
    some = _few(n, 10, rng)
    query[some] = 4 * rng.standard_normal((10, d))
    key[_few(n, 10, rng)] = 1.5 * rng.standard_normal((10, d))
    return 2 * query, 2 * key, value
