"""Uses of tensor attention: tasks about triples that no pairwise unit solves.

Each unit (head) below is one call of the library with constructed weights, not trained
ones, and each output is exact.

* Match2: is there a token with ``x_i + x_j = 0 mod M``? Ordinary attention.
* Match3: are there two with ``x_i + x_j + x_k = 0 mod M``? Attention of order 3. The
  decision of one unit of ordinary attention, of any width, is a threshold on a linear
  functional of the token counts, and four inputs show that no such functional is right.
* Function composition: is ``f(f(0)) = 0``? Path attention, in quadratic time.
* Composition of relations: is there a ``c`` with ``a R c`` and ``c S b``? Strassen
  attention, by matrix products.

    pip install fastattn
    python examples/match3.py

Sanford, Hsu and Telgarsky, Representational Strengths and Limitations of Transformers,
arXiv 2306.02896; Strassen Attention, arXiv 2501.19215.
"""

import math
import sys
from collections.abc import Callable

import numpy as np

import fastattn

TOKENS, MODULUS, INSTANCES = 64, 37, 100
# shares of tokens with a partner: as many instances from each quarter
QUARTERS = 4


def match2(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """Answer Match2 from the definition."""
    return np.isin(-tokens % modulus, tokens)


def match3(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """Answer Match3 from the definition."""
    sums = (tokens[:, None] + tokens[None, :]) % modulus
    return np.isin(-tokens % modulus, sums)


def pairwise_unit(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """Solve Match2 by one unit of ordinary attention.

    The score of a pair is ``cos(theta_i + theta_j)``, 1 only for a match; a pad token
    with a score between 1 and the next smaller one takes the weight without a match.
    """
    gap, theta = angles(tokens, modulus)
    c, s = np.cos(theta), np.sin(theta)
    zero, one = np.zeros_like(c), np.ones_like(c)
    query = np.stack([c, -s, one], axis=1)
    key = np.stack([c, s, zero], axis=1)
    key = np.vstack([key, [0, 0, 1 - gap / 2]])
    value = np.append(one, 0.0)[:, None]
    scale = inverse_temperature(gap, len(tokens))
    out = fastattn.attention(
        query, key, value, scale=scale, method=fastattn.Exact(), guarantee="proven"
    )
    return out[:, 0] > 0.5


def tensor_unit(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """Solve Match3 by one unit of tensor attention of order 3.

    Four coordinates make the score of a triple ``cos(theta_i + theta_j + theta_k)``,
    one gives the pair of the two pads its score, and two keep a pad from joining a
    token.
    """
    gap, theta = angles(tokens, modulus)
    c, s = np.cos(theta), np.sin(theta)
    one, pad = np.ones_like(c), np.zeros((1, 4))
    query = np.stack([c, -c, -s, -s], axis=1)
    query = np.column_stack([query, (1 - gap / 2) * one, -one, -one])
    is_pad = np.append(np.zeros(len(tokens)), 1.0)
    marks = (is_pad, is_pad, 1 - is_pad), (is_pad, 1 - is_pad, is_pad)
    first = np.vstack([np.stack([c, s, c, s], axis=1), pad])
    second = np.vstack([np.stack([c, s, s, c], axis=1), pad])
    keys = tuple(
        np.column_stack([x, *own])
        for x, own in zip((first, second), marks, strict=True)
    )
    value = (1 - is_pad)[:, None]
    out = fastattn.tensor_attention(
        query,
        keys,
        (value, value),
        scale=inverse_temperature(gap, len(tokens) ** 2),
        method=fastattn.Exact(),
        guarantee="proven",
    )
    return out[:, 0] > 0.5


def angles(tokens: np.ndarray, modulus: int) -> tuple[float, np.ndarray]:
    """The gap between 1 and the next smaller cosine, and the angle of each token."""
    return 1 - math.cos(2 * math.pi / modulus), 2 * math.pi * tokens / modulus


def inverse_temperature(gap: float, others: int) -> float:
    """Scale at which half a gap outweighs eight times the number of others."""
    return 2 / gap * math.log(8 * others)


def instances(
    count: int, n: int, modulus: int, truth: Callable, rng: np.random.Generator
) -> list[np.ndarray]:
    """Draw inputs, as many with few positive tokens as with many.

    Uniform tokens would nearly all be positive: those here come from few residues.
    """
    found: list[list[np.ndarray]] = [[] for _ in range(QUARTERS)]
    while min(map(len, found)) < count // QUARTERS:
        residues = rng.choice(modulus, rng.integers(2, modulus // 3), replace=False)
        tokens = rng.choice(residues, n)
        quarter = found[
            min(int(truth(tokens, modulus).mean() * QUARTERS), QUARTERS - 1)
        ]
        if len(quarter) < count // QUARTERS:
            quarter.append(tokens)
    return [tokens for quarter in found for tokens in quarter]


def four_inputs(n: int, modulus: int, rng: np.random.Generator) -> np.ndarray:
    """Inputs that no pairwise unit answers all right at their first token.

    With ``a + p + q = 0`` and ``a + r + s = 0`` the first token ``a`` has a match with
    ``p, q`` and with ``r, s``, but none with ``p, r`` or ``q, s``. Ordinary attention
    says yes where ``sum_j w(a, x_j) > 0`` for some function w, and the total over the
    two inputs with a match equals the total over the two inputs without one.
    """
    while True:
        a, p, r = rng.choice(modulus, 3, replace=False)
        q, s = (-a - p) % modulus, (-a - r) % modulus
        # the rest of each input is the first token again and again
        rest = np.full(n - 3, a)
        inputs = np.array(
            [np.array([a, *pair, *rest]) for pair in ((p, q), (r, s), (p, r), (q, s))]
        )
        answers = [match3(x, modulus)[0] for x in inputs]
        if answers == [True, True, False, False]:
            return inputs


def random_pairwise_unit(
    inputs: np.ndarray, modulus: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Answer for the first tokens by one unit of random weights.

    Embeddings, queries, keys and values are drawn at random for each token.
    """
    query, key = 3 * rng.standard_normal((2, modulus, width))
    value = rng.standard_normal((modulus, 1))
    return np.array(
        [
            fastattn.attention(
                query[x[:1]],
                key[x],
                value[x],
                method=fastattn.Exact(),
                guarantee="proven",
            )[0, 0]
            for x in inputs
        ]
    )


def best_of_threshold(out: np.ndarray, wanted: np.ndarray) -> int:
    """The most right decisions of any threshold on ``out``, in either direction."""
    cuts = np.append(np.sort(out), np.inf)
    right = [int(np.sum((out >= cut) == wanted)) for cut in cuts]
    return max(*right, *(len(out) - x for x in right))


def composed_function(table: np.ndarray) -> np.ndarray:
    """Whether ``f(f(i)) = 0`` for every i, by one unit of path attention.

    The first key has position ``f(i)``, the second has position ``f(f(i))``.
    """
    n = len(table)
    place, target, zero = circle(np.arange(n), n), circle(table, n), np.zeros((n, 2))
    keys = np.hstack([place, target]), np.hstack([zero, place])
    value = np.ones((n, 1)), (np.arange(n) == 0).astype(float)[:, None]
    gap = 1 - math.cos(2 * math.pi / n)
    out = fastattn.tensor_attention(
        np.hstack([target, zero]),
        keys,
        value,
        scale=inverse_temperature(gap, n * n),
        method=fastattn.PathAttention(),
        guarantee="proven",
    )
    return out[:, 0] > 0.5


def composed_relation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether ``a R c`` and ``c S b`` for some c, by one unit of Strassen attention.

    Tokens are the pairs of elements. A token ``(a, b)`` attends to ``(a, c)`` and
    ``(c, b)``: each of the three terms of the score compares one element.
    """
    m = len(first)
    a, b = (x.ravel() for x in np.indices((m, m)))
    left, right, zero = circle(a, m), circle(b, m), np.zeros((m * m, 2))
    keys = np.hstack([left, zero, right]), np.hstack([zero, right, left])
    values = first.reshape(-1, 1).astype(float), second.reshape(-1, 1).astype(float)
    gap = 1 - math.cos(2 * math.pi / m)
    out = fastattn.tensor_attention(
        np.hstack([left, right, zero]),
        keys,
        values,
        scale=inverse_temperature(gap, m**4),
        method=fastattn.StrassenAttention(),
        guarantee="proven",
    )
    # each c that joins them has a weight of 1/m
    return (out[:, 0] > 0.5 / m).reshape(m, m)


def circle(x: np.ndarray, count: int) -> np.ndarray:
    """Points of the unit circle: two of them have product 1 only if they are equal."""
    theta = 2 * math.pi * x / count
    return np.stack([np.cos(theta), np.sin(theta)], axis=1)


def relations(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random relations on six to eight elements, as in the Strassen paper."""
    m = int(rng.integers(6, 9))
    return rng.random((m, m)) < 0.325, rng.random((m, m)) < 0.325


def score(unit: Callable, truth: Callable, inputs: list) -> int:
    """Number of inputs for which a unit is right in every token."""
    return sum(bool(np.array_equal(unit(*x), truth(*x))) for x in inputs)


def main() -> int:
    """Print for how many random inputs each unit is right; return 0 if for all."""
    rng = np.random.default_rng(0)
    tasks = []
    for name, unit, truth in (
        ("Match2, ordinary attention", pairwise_unit, match2),
        ("Match3, tensor attention", tensor_unit, match3),
    ):
        inputs = instances(INSTANCES, TOKENS, MODULUS, truth, rng)
        right = score(unit, truth, [(x, MODULUS) for x in inputs])
        tasks.append((name, right, len(inputs)))
    tables = [(rng.integers(0, TOKENS, TOKENS),) for _ in range(INSTANCES)]
    right = score(composed_function, lambda table: table[table] == 0, tables)
    tasks.append(("f(f(i)) = 0, path attention", right, INSTANCES))
    pairs = [relations(rng) for _ in range(INSTANCES)]
    right = score(composed_relation, lambda r, s: (r.astype(int) @ s) > 0, pairs)
    tasks.append(("relations, Strassen attention", right, INSTANCES))
    for name, right, count in tasks:
        sys.stdout.write(f"{name:32} {right} of {count} inputs right in every token\n")
    inputs = four_inputs(TOKENS, MODULUS, rng)
    wanted = np.array([match3(x, MODULUS)[0] for x in inputs])
    units = [random_pairwise_unit(inputs, MODULUS, 7, rng) for _ in range(200)]
    most = max(best_of_threshold(out, wanted) for out in units)
    exact = int(np.sum([tensor_unit(x, MODULUS)[0] for x in inputs] == wanted))
    sys.stdout.write(
        f"four inputs to Match3: the tensor unit {exact} right, the best of "
        f"{len(units)} pairwise units {most}\n"
    )
    return 0 if exact == 4 and all(right == count for _, right, count in tasks) else 1


if __name__ == "__main__":
    sys.exit(main())
