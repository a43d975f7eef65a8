r"""From vectors to attention: inputs whose output says whether there is a solution.

The logits of real tuples are inner products of the vectors; padded tokens, of value 0,
have a logit between those of a solution and those of all other tuples. The
entries need only be so large that a single solution outweighs all others together:
:math:`\beta = B^k` is the number of coordinates over the gap, times the logarithm of
the number of tuples.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lowerbounds._attention_instance import AttentionInstance
from lowerbounds._instance import VectorInstance
from sketching._lib.arrays import Array
from sketching._lib.validation import check_choice

CONSTRUCTIONS = ("calibrated", "direct", "padded")


def reduce_to_attention(
    instance: VectorInstance, *, construction: str = "calibrated"
) -> AttentionInstance:
    r"""Turn a question about vectors into inputs of attention of the same order.

    Parameters
    ----------
    instance : VectorInstance
        Sets of vectors: two for attention, k for tensor attention of order k.
    construction : {"calibrated", "direct", "padded"}
        ``"calibrated"``: one padded key in each factor, at the midpoint of the gap; the
        output is near 1 with a solution and near 0 without. ``"direct"``: the padded
        keys at the level of a solution, for orthogonal vectors only: half the
        exponent, half the error. ``"padded"``: the layout of the papers, as many
        padded tokens as real ones, of the largest logit in every row: outputs, and
        the error they allow, are tiny.

    Returns
    -------
    AttentionInstance
        Query, keys, values and scale, the entry bound, the error that is allowed and
        ``decide(output)``.

    Raises
    ------
    ValueError
        If the construction is unknown, or direct for a gap problem.

    Notes
    -----
    For a gap of g, D coordinates and N tuples, the entry bound is
    :math:`(2 D \ln(4N) / g)^{1/k}` calibrated and :math:`(D \ln(4N))^{1/k}` direct.
    With D a multiple of ln n this is :math:`\Theta((\ln n)^{2/k})` for orthogonal
    vectors, whose gap is 1, and :math:`\Theta((\ln n)^{1/k})` where the gap grows as
    D does: the step between is the distributed proof (`amplify_gap`).

    References
    ----------
    J. Alman and Z. Song, Fast attention requires bounded entries, NeurIPS 2023,
    arXiv:2302.13214; How to capture higher-order correlations? Generalizing matrix
    softmax attention to Kronecker computation, ICLR 2024, arXiv:2310.04064.

    Examples
    --------
    >>> from lowerbounds import orthogonal_vectors, reduce_to_attention
    >>> instance = orthogonal_vectors(32, 60, parts=3, rng=0)
    >>> made = reduce_to_attention(instance)
    >>> made.query.shape, [key.shape for key in made.keys]
    ((32, 63), [(33, 63), (33, 63)])
    >>> round(made.entry_bound, 2), round(made.error, 2)
    (10.18, 0.4)
    """
    if not isinstance(instance, VectorInstance):
        raise TypeError(
            f"instance: expected a VectorInstance, got {type(instance).__name__}"
        )
    check_choice("construction", construction, CONSTRUCTIONS)
    if construction == "padded":
        return _padded(instance)
    return _single_pad(instance, construction)


def decide(
    instance: VectorInstance | AttentionInstance,
    attention: Callable[..., Any] | None = None,
    *,
    construction: str = "calibrated",
) -> bool:
    """Decide whether vectors have a solution, by attention.

    Parameters
    ----------
    instance : VectorInstance or AttentionInstance
        The question, or inputs already made of it.
    attention : callable, optional
        Called as ``attention(query, key, value, scale=...)``, or with tuples of keys
        and of values where the order is more than 2, on NumPy arrays of float64. The
        answer is what its output says, right or wrong. By default exact attention, in
        logarithms where the output is too small for floating point.
    construction : str
        As for `reduce_to_attention`.

    Returns
    -------
    bool
        The answer; right if the output is within the error the inputs allow.

    Raises
    ------
    ValueError
        If the output has a wrong shape or is not finite.
    RefusalError
        If the output cannot be distinguished from 0, or if ``attention`` refuses.

    Examples
    --------
    >>> import functools
    >>> import fastattn
    >>> from lowerbounds import decide, orthogonal_vectors
    >>> instance = orthogonal_vectors(32, 30, rng=0)
    >>> decide(instance), instance.has_solution
    (True, True)
    >>> exact = functools.partial(fastattn.attention, method=fastattn.Exact())
    >>> decide(instance, exact)
    True
    """
    if isinstance(instance, VectorInstance):
        instance = reduce_to_attention(instance, construction=construction)
    if attention is None:
        return instance.decide_log(instance.log_output())
    # before the work: exact attention would refuse with another message
    instance.check_range(instance.query.dtype)
    return instance.decide(attention(*instance.arguments, scale=instance.scale))


def _single_pad(instance: VectorInstance, construction: str) -> AttentionInstance:
    """One padded key in each factor, so that one tuple is padded throughout."""
    sign = -1 if instance.seeks_orthogonal else 1
    if construction == "direct":
        if not instance.seeks_orthogonal:
            raise ValueError(
                "construction: 'direct' is for orthogonal vectors, got a gap problem: "
                "take 'calibrated' or 'padded'"
            )
        level, above, below = float(sign * instance.yes), 0.0, 1.0
    else:
        level = sign * (instance.yes + instance.no) / 2
        above = below = abs(instance.yes - instance.no) / 2
    query, *keys = (x.astype(np.float64) for x in instance.vectors)
    keys[0] = sign * keys[0]
    query, keys = _with_pad(query, keys, level)
    if sign < 0 and len(keys) > 1:
        query, keys = _without_mixed(query, keys)
    # real tuples, and those that mix padded and real keys
    real = math.prod(len(key) - 1 for key in keys)
    mixed = math.prod(len(key) for key in keys) - 1 - real
    d = query.shape[1]
    exponent = d / below * math.log(4 * (real + mixed))
    worst = real / (4 * (real + mixed))
    solved = exponent * above / d
    rest = math.exp(-solved) * (1 + mixed / (4 * (real + mixed)))
    root = exponent ** (1 / instance.parts)
    return AttentionInstance(
        instance=instance,
        construction=construction,
        query=root * query,
        keys=tuple(root * key for key in keys),
        values=tuple(_indicator(len(key) - 1, 1) for key in keys),
        scale=1 / d,
        log_yes=-math.log1p(rest),
        log_no=math.log(worst / (1 + worst)),
        rows=len(query),
    )


def _with_pad(
    query: Array, keys: list[Array], level: float
) -> tuple[Array, list[Array]]:
    """Append one padded key to each factor; the logit of their tuple is ``level``."""
    # spread over coordinates, so that no entry exceeds those of the vectors
    width = math.ceil(abs(level))
    query = np.pad(query, ((0, 0), (0, width)), constant_values=1)
    padded = []
    for s, key in enumerate(keys):
        tokens = np.pad(key, ((0, 1), (0, width)))
        tokens[-1, key.shape[1] :] = level / width if s == 0 and width else 1
        padded.append(tokens)
    return query, padded


def _without_mixed(query: Array, keys: list[Array]) -> tuple[Array, list[Array]]:
    """Lower the logits of mixed tuples; the padded key of each factor is the last.

    Going round the factors, such a tuple passes from a padded to a real key at least
    once: one coordinate for each factor is -1 there and 0 for all other pairs.
    """
    count = len(keys)
    query = np.pad(query, ((0, 0), (0, count)), constant_values=-1)
    marked = []
    for s, key in enumerate(keys):
        marks = np.ones((len(key), count))
        marks[:-1, s] = 0
        marks[-1, (s - 1) % count] = 0
        marked.append(np.hstack([key, marks]))
    return query, marked


def _padded(instance: VectorInstance) -> AttentionInstance:
    """As many padded tokens as real ones; they have the largest logit of every row."""
    vectors, yes, no = instance.vectors, instance.yes, instance.no
    if instance.seeks_orthogonal:
        vectors, yes, no = _complement(vectors), instance.d - yes, instance.d - no
    k, d = len(vectors), vectors[0].shape[1]
    tuples = math.prod(len(x) for x in vectors[1:])
    exponent = 2 * d / (yes - no) * math.log(2 ** (k + 1) * tuples)
    # the sum of a row is that of its padded tuples, and at most this much more
    peak = min(int(x.sum(axis=1).max()) for x in vectors)
    mixed = 2 ** (k - 1) - 2
    more = mixed * math.exp(-exponent / 2) + math.exp(exponent * (peak - d) / (2 * d))
    root = exponent ** (1 / k)
    query, *keys = (_half_padded(x, first=s == 0) for s, x in enumerate(vectors))
    return AttentionInstance(
        instance=instance,
        construction="padded",
        query=root * query,
        keys=tuple(root * key for key in keys),
        values=tuple(_indicator(len(x), len(x)) for x in vectors[1:]),
        scale=1 / (2 * d),
        log_yes=exponent * (yes - d) / (2 * d) - math.log(tuples) - math.log1p(more),
        log_no=exponent * (no - d) / (2 * d),
        rows=len(vectors[0]),
    )


def _half_padded(vectors: Array, *, first: bool) -> Array:
    """Rows (x, 1) of a query or (x, 0) of a key, then as many rows (0, 1)."""
    n, d = vectors.shape
    tokens = np.zeros((2 * n, 2 * d))
    tokens[:n, :d] = vectors
    tokens[:n, d:] = first
    tokens[n:, d:] = 1
    return tokens


def _complement(vectors: tuple[Array, ...]) -> tuple[Array, ...]:
    r"""Write :math:`d - \langle x, y, \dots \rangle` as an inner product of kd bits.

    A coordinate where not all are 1 counts once: in the block of the first that is 0.
    """
    k = len(vectors)
    return tuple(
        np.hstack([x if s < j else 1 - x if s == j else 0 * x + 1 for j in range(k)])
        for s, x in enumerate(vectors)
    )


def _indicator(real: int, padded: int) -> Array:
    """Values: 1 on real keys, 0 on padded ones."""
    return np.repeat([1.0, 0.0], [real, padded])[:, None]
