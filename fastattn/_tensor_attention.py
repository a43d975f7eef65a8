"""Tensor attention: queries attend to tuples of keys, one key of each factor."""

from typing import Any

from fastattn._attention import approximate
from fastattn.problem.plan import Method
from sketching._lib.arrays import Array
from sketching._lib.random import RandomSource


def tensor_attention(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: tuple[Array | None, ...] | None = None,
    method: Method | None = None,
    guarantee: str = "sampled",
    rng: RandomSource = None,
) -> Array:
    r"""Tensor attention of any order to a tolerance.

    With two factors of keys and values, of order 3, the answer to a query :math:`q` is

    .. math:: \frac{\sum_{j,l} \exp(s\,\langle q, k_j \circ k'_l\rangle)\,
        v_j \circ v'_l}{\sum_{j,l} \exp(s\,\langle q, k_j \circ k'_l\rangle)},

    a softmax over all pairs of keys; with more factors over all tuples. With one it is
    ordinary attention. Use :func:`approximate` on the same arguments to see the
    certificate.

    Parameters
    ----------
    query : array, shape (..., n, d)
        Queries; leading dimensions are batch and heads.
    keys : tuple of array, shapes (..., m, d)
        One array of keys for each factor; their lengths may differ.
    values : tuple of array, shapes (..., m, p)
        One value for each key.
    tol : float, default 1e-2
        As in :func:`attention`; with ``guarantee="proven"`` in units of half the range
        of the products of values.
    scale : float, optional
        The factor :math:`s`. By default ``1 / d``.
    is_causal : bool, default False
        Query ``i`` attends to tuples whose keys all have indices ``<= i``.
    key_mask : tuple of boolean array, shapes (..., m), or None, optional
        True for keys that take part, an entry for each factor, each as in
        :func:`attention`, None for all keys. A row that attends to no tuple gets zeros.
    method : AttentionMethod, optional
        ``Auto()`` by default; ``Exact()`` or ``Polynomial()``; ``TensorWindow()`` for
        causal windows of keys, ``StrassenAttention()`` and ``PathAttention()`` for
        logits that are sums over pairs. A method that cannot meet ``tol`` is refused.
    guarantee : {"sampled", "proven"}
        An exact row costs one logit for each tuple. Where that is too expensive for
        enough rows, a sampled certificate rests on sampled tuples;
        ``certificate.source`` says how many. A proven one is a worst-case bound from
        bounds on the inputs.
    rng : int or Generator, optional
        Source of the samples; an int makes the call reproducible.

    Returns
    -------
    array, shape (..., n, p)
        Of the library and dtype of the inputs.

    Raises
    ------
    TypeError
        If the inputs are no arrays of one library and one floating-point dtype.
    ValueError
        If shapes or numbers of factors do not match, an array is empty or not finite,
        or an option is out of range.
    RefusalError
        If the given method cannot meet ``tol``, or if none but exact attention can and
        would take hours; the message has the numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import tensor_attention
    >>> rng = np.random.default_rng(0)
    >>> query, key, other = rng.uniform(-1, 1, (3, 500, 8))
    >>> value, another = rng.uniform(0, 1, (2, 500, 3))
    >>> tensor_attention(query, (key, other), (value, another), rng=0).shape
    (500, 3)

    References
    ----------
    Alman and Song, How to Capture Higher-order Correlations? Generalizing Matrix
    Softmax Attention to Kronecker Computation, arXiv 2310.04064.
    """
    options: dict[str, Any] = {
        "tol": tol,
        "scale": scale,
        "is_causal": is_causal,
        "key_mask": key_mask,
        "method": method,
        "guarantee": guarantee,
        "rng": rng,
    }
    if not isinstance(keys, tuple):
        raise TypeError(
            "keys: expected a tuple, one entry for each factor, got "
            f"{type(keys).__name__}"
        )
    return approximate(query, keys, values, **options).value
