"""Linear attention: weights are products of features; time is linear in the length."""

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from fastattn.linear.head_vjp import vjp_of
from fastattn.linear.heads import Answer, LinearHead
from fastattn.linear.protocol import FeatureMap, Reader
from fastattn.problem.batch import Batch, own_place, pick
from fastattn.problem.derivatives import assembled, check_grad, unmasked
from sketching._lib.arrays import Array, array_namespace, place_of, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.threads import parallel_map
from sketching._lib.validation import check_flag, not_finite

# least number of rows of a head whose inputs are checked block by block
_LONG = 4096


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    decay: float | Array | None = None,
    normalize: bool = True,
) -> Array:
    r"""Attention whose weights are products of features.

    Computes :math:`D^{-1} \phi(Q) (\phi(K)^\top V)` for each head, where :math:`D`
    makes the weights :math:`\phi(q) \cdot \phi(k)` of a row add up to one, without
    forming them: time and memory are linear in the number of queries and keys.

    Parameters
    ----------
    query : array, shape (..., n, d)
        Queries :math:`Q`; leading dimensions are batch and heads.
    key : array, shape (..., m, d)
        Keys :math:`K`; leading dimensions broadcast against those of ``query``.
    value : array, shape (..., m, p)
        Values :math:`V`, one for each key.
    feature_map : FeatureMap
        The map :math:`\phi`: :class:`EluPlusOne`, :class:`Relu`, :class:`Cosformer`,
        :class:`RandomFeatures`, :class:`Taylor`, :class:`RandomMaclaurin`,
        :class:`TensorSketch`, :class:`PolySketch` or :class:`Identity`.
    scale : float, optional
        The factor of the logits; queries and keys are multiplied by the root of its
        size. By default ``d ** -0.5`` for maps that approximate softmax, ``1 / d`` for
        ``PolySketch``, else 1.
    is_causal : bool, default False
        Query ``i`` attends to keys ``j <= i`` only.
    key_mask : boolean array, shape (..., m), optional
        True for keys that take part, as in :func:`attention`. A row that attends to no
        key gets zeros.
    decay : float or array, optional
        With ``is_causal``: the weight of key ``j`` for query ``i`` is multiplied by
        ``decay ** (i - j)``, as in a retention layer. One number between 0 and 1, or
        one for each head.
    normalize : bool, default True
        Divide by the sum of weights; else the answer is the weighted sum of values.

    Returns
    -------
    array, shape (..., n, p)
        Of the library and dtype of the inputs. A row whose weights add up to zero
        gets zeros. float16 and bfloat16 are computed in float32.

    Raises
    ------
    TypeError
        If the inputs are no arrays of one library and one floating-point dtype.
    ValueError
        If shapes do not match, an array is empty or not finite, or an option is out
        of range.
    RefusalError
        If numbers overflow, or all weights of a row that approximate softmax vanish.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import EluPlusOne, linear_attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 2, 100, 16))
    >>> linear_attention(query, key, value, feature_map=EluPlusOne()).shape
    (2, 100, 16)

    References
    ----------
    Katharopoulos, Vyas, Pappas and Fleuret, Transformers are RNNs, arXiv 2006.16236.
    Sun et al., Retentive Network, arXiv 2307.08621.
    """
    check_map(feature_map)
    batch = Batch.of(query, key, value, scale, is_causal, key_mask, finite=False)
    batch = _scaled(batch, feature_map, scale)
    xp = array_namespace(batch.query)
    n, p = batch.query.shape[-2], batch.value.shape[-1]
    parts = _heads(batch, feature_map, decay, normalize)
    sees_all = key_mask is None and (not is_causal or batch.key.shape[-2] <= n)
    if sees_all and n >= _LONG and place_of(batch.query) == "cpu":
        # all inputs are read anyway: check blocks for NaN while they are in cache
        parts = [replace(part, check=batch.check_finite) for part in parts]
    else:
        batch.check_finite()
    answers = _answers(batch, parts)
    whole = answers[0] if len(answers) == 1 else xp.stack(answers)
    return xp.reshape(whole, (*batch.lead, n, p))


def linear_attention_vjp(
    query: Array,
    key: Array,
    value: Array,
    grad_output: Array,
    *,
    feature_map: FeatureMap,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    decay: float | Array | None = None,
    normalize: bool = True,
) -> tuple[Array, Array, Array]:
    r"""Differentiate ``sum(grad_output * linear_attention(query, key, value))``.

    It takes two more passes over queries and keys; with ``is_causal`` all features
    are stored. The feature map draws the same random numbers as in
    :func:`linear_attention`.

    Parameters
    ----------
    query, key, value : array, shapes (..., n, d), (..., m, d), (..., m, p)
        As in :func:`linear_attention`.
    grad_output : array, shape (..., n, p)
        Gradient of a loss with respect to the output of :func:`linear_attention`, of
        its shape and dtype.
    feature_map, scale, is_causal, key_mask, decay, normalize
        As in :func:`linear_attention`.

    Returns
    -------
    tuple of array
        Gradients with respect to ``query``, ``key`` and ``value``, each of the shape
        and dtype of its argument: summed over dimensions that were broadcast.

    Raises
    ------
    TypeError
        If the inputs are no arrays of one library and one floating-point dtype.
    ValueError
        If shapes do not match, an array is empty or not finite, or an option is out
        of range.
    RefusalError
        If numbers overflow.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import EluPlusOne, linear_attention, linear_attention_vjp
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad = rng.standard_normal((4, 5, 3))
    >>> options = {"feature_map": EluPlusOne(), "is_causal": True}
    >>> d_query, _, _ = linear_attention_vjp(query, key, value, grad, **options)
    >>> step = np.zeros((5, 3))
    >>> step[2, 1] = 1e-6
    >>> more, less = (
    ...     linear_attention(query + x, key, value, **options) for x in (step, -step)
    ... )
    >>> bool(abs(np.sum(grad * (more - less)) / 2e-6 - d_query[2, 1]) < 1e-6)
    True
    """
    check_map(feature_map)
    batch = Batch.of(query, key, value, scale, is_causal, key_mask)
    batch = _scaled(batch, feature_map, scale)
    grad_output = check_grad(batch, grad_output)
    parts = _heads(batch, feature_map, decay, normalize)
    total: list[dict[tuple[int, ...], Array]] = [{}, {}, {}]
    inputs = batch.query, batch.key, batch.value
    for place, part in zip(np.ndindex(*batch.lead), parts, strict=True):
        grad = grad_output[(*place, ...)]
        grad = part.head.xp.astype(grad, part.features.dtype, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            gradients = unmasked(batch, place, vjp_of(part, grad))
        for sums, x, gradient in zip(total, inputs, gradients, strict=True):
            own = own_place(x, place)
            sums[own] = sums[own] + gradient if own in sums else gradient
    names = "query", "key", "value"
    first, second, third = (
        assembled(*each) for each in zip(names, inputs, total, strict=True)
    )
    return first, second, third


def check_map(feature_map: Any) -> None:
    """Raise ``TypeError`` unless the argument is a feature map."""
    if isinstance(feature_map, type) or not hasattr(feature_map, "vjp"):
        raise TypeError(
            "feature_map: expected a feature map such as EluPlusOne() or "
            f"RandomFeatures(), got {feature_map!r}"
        )


def check_decay(decay: Any) -> Array:
    """Return decays on the host; raise unless they are above 0 and up to 1."""
    rates = np.asarray(to_host(decay) if hasattr(decay, "shape") else decay)
    if rates.dtype.kind not in "fiu":
        raise TypeError(f"decay: expected real numbers, got {rates.dtype}")
    if not bool(np.all((rates > 0) & (rates <= 1))):
        raise ValueError(f"decay: expected numbers above 0 and up to 1, got {decay!r}")
    return rates.astype(np.float64)


def _scaled(batch: Batch, feature_map: Any, scale: float | None) -> Batch:
    """Give the map its own scale where none was given."""
    if scale is not None:
        return batch
    return replace(batch, scale=feature_map.default_scale(batch.query.shape[-1]))


def _heads(
    batch: Batch, feature_map: FeatureMap, decay: Any, normalize: bool
) -> list[LinearHead]:
    """The heads of a batch, with their features."""
    check_flag("normalize", normalize)
    rates = _decays(batch, decay)
    features = Reader.of(feature_map, batch.query, batch.scale)
    parts = []
    for number, (place, rate) in enumerate(
        zip(np.ndindex(*batch.lead), rates, strict=True)
    ):
        column = np.arange(batch.key.shape[-2])
        if batch.key_mask is not None:
            column = np.flatnonzero(to_host(pick(batch.key_mask, place, 1)))
        head = batch.head(number)
        parts.append(LinearHead(head, features, column, rate, bool(normalize)))
    return parts


def _decays(batch: Batch, decay: Any) -> list[float | None]:
    """Return the decay of each head."""
    if decay is None:
        return [None] * batch.count
    if not batch.is_causal:
        raise ValueError("decay: expected is_causal=True, got is_causal=False")
    rates = check_decay(decay)
    try:
        rates = np.broadcast_to(rates, batch.lead)
    except ValueError as error:
        raise ValueError(
            f"decay: expected one number, or one for each head in {batch.lead}, got "
            f"shape {rates.shape}"
        ) from error
    return [float(rate) for rate in rates.reshape(-1)]


def _answers(batch: Batch, parts: list[LinearHead]) -> list[Array]:
    """Outputs of the heads, in parallel on the CPU; shared keys are summed once."""
    groups: dict[Any, list[int]] = {}
    for number, place in enumerate(np.ndindex(*batch.lead)):
        shared = [own_place(batch.key, place), own_place(batch.value, place)]
        if batch.key_mask is not None:
            shared.append(own_place(batch.key_mask, place, 1))
        groups.setdefault(tuple(shared), []).append(number)

    def work(members: list[int]) -> list[tuple[int, Array]]:
        first = parts[members[0]]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            state = None if first.is_sequential else first.state()
            return [(i, _checked(parts[i], parts[i].answer(state))) for i in members]

    found = dict(chain(*parallel_map(work, list(groups.values()), batch.query)))
    return [found[number] for number in range(batch.count)]


def _checked(part: LinearHead, answer: Answer) -> Array:
    """Return the output in the dtype of its query; raise RefusalError on overflow."""
    xp, head = part.head.xp, part.head
    with np.errstate(over="ignore"):
        value = xp.astype(answer.value, head.query.dtype, copy=False)
    if not_finite(value)[0]:
        raise RefusalError(
            f"weights or sums overflow {head.dtype}: scale query, key or value down or "
            "pass arrays of a wider dtype"
        )
    part.check_weights(answer.total, slice(0, head.sizes[0]))
    return value
