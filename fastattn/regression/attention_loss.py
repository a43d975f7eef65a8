"""The squared loss of one attention layer, and its gradient."""

from typing import Any

from fastattn._attention import attention
from fastattn.gradients.vjp import attention_vjp
from fastattn.problem.plan import Method
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_float_array


def loss_gradient(
    a1: Array,
    a2: Array,
    a3: Array,
    x: Array,
    y: Array,
    target: Array,
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    method: Method | None = None,
    rng: RandomSource = None,
) -> Array:
    r"""Gradient of the loss of one attention layer by its query-key matrix.

    The loss is :math:`L(X) = \frac12 \| D^{-1} \exp(s\,A_1 X A_2^\top) A_3 Y - E
    \|_F^2`, where :math:`D` makes rows sum to one. With :math:`f` the softmax matrix,
    :math:`q = (f A_3 Y - E)(A_3 Y)^\top` and :math:`r_i = \langle f_i, q_i\rangle`,
    :math:`dL/dX = s\,A_1^\top (f \circ q - \mathrm{diag}(r) f) A_2`. It takes
    near-linear time wherever :func:`attention` and :func:`attention_vjp` do.

    Parameters
    ----------
    a1, a2, a3 : array, shapes (..., n, d), (..., m, e), (..., m, c)
        Inputs of the layer; :math:`A_1 X`, :math:`A_2` and :math:`A_3 Y` are its
        queries, keys and values.
    x : array, shape (..., d, e)
        Product of the query and key matrices.
    y : array, shape (..., c, p)
        The value matrix.
    target : array, shape (..., n, p)
        The target :math:`E` of the output.
    tol : float, default 1e-2
        As in :func:`attention` and :func:`attention_vjp`.
    scale : float, optional
        The factor :math:`s`, by default ``e ** -0.5``; the paper has ``1 / d``.
    method : AttentionMethod, optional
        As in :func:`attention_vjp`.
    rng : int or Generator, optional
        Source of the samples.

    Returns
    -------
    array, shape (..., d, e)
        The gradient of the loss with respect to ``x``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import loss_gradient
    >>> rng = np.random.default_rng(0)
    >>> a1, a2, a3, target = rng.standard_normal((4, 20, 3))
    >>> x, y = rng.standard_normal((2, 3, 3))
    >>> loss_gradient(a1, a2, a3, x, y, target).shape
    (3, 3)

    References
    ----------
    Alman and Song, The Fine-Grained Complexity of Gradient Computation for Training
    Large Language Models, arXiv 2402.04497.
    """
    names = {"a1": a1, "a2": a2, "a3": a3, "x": x, "y": y, "target": target}
    xp = array_namespace(*names.values())
    for name, array in names.items():
        check_float_array(name, array, least_ndim=2)
    for left, right in (("a1", "x"), ("a3", "y")):
        if names[left].shape[-1] != names[right].shape[-2]:
            raise ValueError(
                f"{left} has {names[left].shape[-1]} columns and {right} has "
                f"{names[right].shape[-2]} rows"
            )
    query, value = xp.matmul(a1, x), xp.matmul(a3, y)
    forward, backward = as_generator(rng).spawn(2)
    options: dict[str, Any] = {"tol": tol, "scale": scale, "method": method}
    output = attention(query, a2, value, rng=forward, **options)
    if target.shape != output.shape:
        raise ValueError(
            f"target: expected shape {output.shape}, as the output, got {target.shape}"
        )
    gradient, _, _ = attention_vjp(
        query, a2, value, output - target, rng=backward, **options
    )
    return xp.matmul(xp.matrix_transpose(a1), gradient)
