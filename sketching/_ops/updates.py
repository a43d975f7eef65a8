"""Updates of a metric: the new factor, and the new norms of points."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def changed_factor(
    factor: Array,
    left: Array,
    right: Array,
    *,
    out: Array | None = None,  # noqa: ARG001
) -> tuple[Array, Array]:
    """``U + sum a_t b_t^T``, and ``U_t^T a_t`` of the factor before each update.

    ``factor`` is ``(k, d)``; ``left``, ``(r, k)``, and ``right``, ``(r, d)``, are the
    updates. Returns ``(k, d)`` and ``(r, d)``; ``out``, of the shape of the factor, may
    be overwritten: a kernel may write the new factor there.
    """
    xp = array_namespace(factor, left, right)
    earlier = xp.tril(xp.matmul(left, left.T), k=-1)
    images = xp.matmul(left, factor) + xp.matmul(earlier, right)
    return factor + xp.matmul(left.T, right), images


@op("cpu")
def changed_norms(
    points: Array,
    vectors: Array,
    of_points: Array,
    seen: Array,
    of_updates: Array,
    *,
    rounding: float,
    steps: Array | None = None,
    keep: bool = False,
) -> tuple[Array, Array]:
    r"""Squared norms :math:`|U x_i|^2` after ``U += sum a_t b_t^T``, with error bounds.

    ``points`` is ``(n, d)``, of integers if there are ``steps``, ``(n,)``, to multiply
    them by. The rows of ``of_points``, ``(3, n)``, are the squared norms before, bounds
    on their errors, and Euclidean lengths; a kernel may overwrite it. Those of
    ``of_updates``, ``(5, r)``, are ``|a_t|^2``, ratios, ``|b_t|``, ``|U_t^T a_t|`` and
    the number of the update. ``vectors``, ``(r + m, d)``, are all ``b_t``, then ``U_t^T
    a_t`` of the first ``m`` updates; those of the others are the ratio times ``b_t``. A
    point has already ``seen``, ``(n,)``, the updates of lesser numbers. The error of a
    product is at most ``rounding`` times its terms, or more in a kernel that rounds the
    factors. Returns the new ``of_points``, and the products with all ``b_t``, ``(n,
    r)``, or ``(n, 0)`` if they are not needed.
    """
    xp = array_namespace(points, vectors)
    squares, ratios, of_right, of_image, order = (of_updates[t, :] for t in range(5))
    if steps is not None:
        points = steps[:, None] * xp.astype(points, vectors.dtype)
    products = xp.matmul(points, vectors.T)
    r = squares.shape[0]
    is_new = order >= xp.astype(seen, xp.float64)[:, None]
    kept = xp.where(is_new, products[:, :r], xp.zeros_like(products[:, :r]))
    w, given = xp.astype(kept, xp.float64), xp.astype(products[:, r:], xp.float64)
    m = given.shape[1]
    given = xp.where(is_new[:, :m], given, xp.zeros_like(given))
    v = xp.concat([given, w[:, m:] * ratios[m:]], axis=1)
    change = xp.sum(w * (2 * v + squares * w), axis=1)
    wide = of_image + squares * of_right
    terms = xp.sum(xp.abs(v) * of_right + xp.abs(w) * wide, axis=1)
    after = of_points[0, :] + change
    h = xp.maximum(after, xp.zeros_like(after))
    # two factors that are both off add the product of that
    both = xp.sum(of_right * (of_image + wide))
    apart = rounding * of_points[2, :]
    off = of_points[1, :] + apart * (2 * terms + apart * both)
    return xp.stack([h, off, of_points[2, :]]), kept[:, : r if keep else 0]
