"""Keys and values prepared once, for queries that come later.

Each head becomes a data structure: keys can be inserted, structures over disjoint keys
merged, and the structures saved. The certificate of a key-value state, which replaces
the keys, rests on held-out queries, whose exact outputs are known.
"""

from typing import Any

import numpy as np

from fastattn.files.formats import PathLike
from fastattn.planning.options import check_options, check_served
from fastattn.prepared.files import read_header, read_heads
from fastattn.prepared.planning import Request, prepare_head
from fastattn.prepared.rows import Rows
from fastattn.prepared.structure import Prepared
from fastattn.prepared.tensor.planning import prepare_tensor_head
from fastattn.problem.batch import Batch, each_head, pick, place_of_head
from fastattn.problem.plan import Method, Task
from fastattn.tensor.problem import TensorBatch
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.random import RandomSource


def prepare(
    key: Array | tuple[Array, ...],
    value: Array | tuple[Array, ...],
    *,
    queries: Array,
    tol: float = 1e-2,
    scale: float | None = None,
    key_mask: Array | tuple[Array | None, ...] | None = None,
    method: Method | None = None,
    guarantee: str = "sampled",
    rng: RandomSource = None,
) -> Prepared:
    r"""Prepare keys and values for queries that come later.

    For each head a data structure is made that answers softmax attention over the
    keys within ``tol``: a key-value state, which replaces the keys, where that is
    predicted to be faster and meets the tolerance, else the keys in a buffer.

    Parameters
    ----------
    key : array, shape (..., m, d)
        Keys; leading dimensions are batch and heads. Memory maps are welcome.
    value : array, shape (..., m, p)
        Values, one for each key. Tuples of keys and of values, and of masks, mean
        :func:`tensor_attention`.
    queries : array, shape (..., q, d)
        A sample of the queries to come, some hundred for each head. Structures are
        planned for queries like these, and some of them are held out.
    tol : float, default 1e-2
        As in :func:`attention`.
    scale : float, optional
        The factor of the logits. By default ``d ** -0.5``, of tensor attention
        ``1 / d``.
    key_mask : boolean array, shape (..., m), optional
        True for keys that take part, as in :func:`attention`.
    method : AttentionMethod, optional
        ``Auto()`` by default: the structure with the cheapest query. ``Exact()`` is a
        KV buffer, ``Polynomial(...)`` a key-value state, which is refused where it
        misses ``tol``; ``Multipole()`` clusters the keys.
    guarantee : {"sampled", "proven"}
        What the certificate rests on: held-out queries, or a theorem that holds within
        bounds on queries, keys and values, outside of which inputs are refused. The
        bounds on queries are a tenth larger than ``queries``. For tensor attention
        states are made with "proven" only.
    rng : int or Generator, optional
        Source of the samples; an int makes the call reproducible.

    Returns
    -------
    Prepared
        With ``query``, ``insert``, ``merge``, ``empty``, ``save``, ``certificate``,
        ``plan``, ``count`` and ``nbytes``.

    Raises
    ------
    TypeError
        If the inputs are no arrays of one library and one floating-point dtype.
    ValueError
        If shapes do not match, an array is empty or not finite, or an option is out
        of range.
    RefusalError
        If the given method cannot meet ``tol``.

    Notes
    -----
    At most 128 of the queries, never more than half, are held out: their exact outputs
    are updated with every insertion, which costs 128 rows of attention, and compared
    with the outputs of the structure. The certificate is about queries drawn like
    ``queries``. A key-value state does not grow with the keys, except for far ones. It
    has a buffer of fewer than 256 recent keys, which are attended to exactly. Queries
    far from ``queries`` are refused.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import prepare
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = 0.3 * rng.standard_normal((3, 4096, 16))
    >>> prepared = prepare(key, value, queries=query[:512], tol=0.1, rng=0)
    >>> prepared.insert(key[:10], value[:10]).count
    4106
    >>> bool(prepared.query(query[512:513]).certificate.error <= 0.1)
    True

    References
    ----------
    Alman and Song, Fast Attention Requires Bounded Entries, arXiv 2302.13214.
    """
    tol, method, generator = check_options(tol, method, guarantee, rng)
    is_tensor = isinstance(key, tuple)
    check_served(prepare_tensor_head if is_tensor else prepare_head, method)
    kind = TensorBatch if is_tensor else Batch
    batch: Any = kind.of(queries, key, value, scale, False, key_mask)
    streams = generator.spawn(batch.count)

    def make(i: int) -> Any:
        if is_tensor:
            task = Task(batch.head(i), tol, guarantee, streams[i])
            return prepare_tensor_head(method, task)
        place = place_of_head(i, batch.lead)
        rows = Rows.of(batch.key, batch.value, batch.key_mask, place)
        head, count = rows.head(
            pick(batch.query, place), batch.scale, guarantee, streams[i]
        )
        request = Request(
            head,
            lambda empty: rows.insert_into(empty, fold=True),
            count,
            tol,
            guarantee,
        )
        return prepare_head(method, request, streams[i])

    heads = each_head(batch.lead, batch.query, make)
    options = {
        "lead": list(batch.lead),
        "d": batch.query.shape[-1],
        "p": (value[0] if isinstance(value, tuple) else value).shape[-1],
        "scale": batch.scale,
        "tol": tol,
        "guarantee": guarantee,
        "dtype": str(batch.query.dtype).rpartition(".")[2],
        "seed": int(generator.integers(1 << 62)),
    }
    if is_tensor:
        options["factors"] = len(key)
    place = (0,) * (batch.query.ndim - 2)
    like = batch.query[(*place, slice(0, 0), slice(None))]
    return Prepared(heads, like, options)


def load(
    path: PathLike, *, like: Array | None = None, memory: int | None = None
) -> Prepared:
    """Read what :meth:`Prepared.save` wrote.

    Parameters
    ----------
    path : str or path
        The file.
    like : array, optional
        An array of the library, device and dtype of the queries to come; by default
        NumPy arrays of the dtype of the keys.
    memory : int, optional
        Bytes that the arrays of the file may take; by default 16 times its size, and
        at least 64 MiB. ``save`` does not compress: only a file from elsewhere, perhaps
        a malicious one, takes more than its size.

    Returns
    -------
    Prepared
        Its answers equal those of the saved structure, bit for bit.

    Raises
    ------
    ValueError
        If the file is truncated or damaged, of another kind or of a newer version, if
        it unpacks to more than ``memory``, or if ``like`` has another dtype; the
        message names the path.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from fastattn import load, prepare
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 64, 4))
    >>> prepared = prepare(key, value, queries=query)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prepared.save(f"{folder}/keys.npz")
    ...     again = load(f"{folder}/keys.npz")
    >>> np.array_equal(again.query(query).value, prepared.query(query).value)
    True
    """
    header = read_header(path, memory)
    options = header["options"]
    name = options.get("dtype")
    if like is None:
        if name not in ("float16", "float32", "float64"):
            raise ValueError(f"{path}: holds {name} keys: give like=, an array of them")
        like = np.empty((0, 1), dtype=name)
    array_namespace(like)
    if str(like.dtype).rpartition(".")[2] != name:
        raise ValueError(f"{path}: holds {name} keys, but like is {like.dtype}")
    return Prepared(read_heads(path, header, like, memory), like, options)
