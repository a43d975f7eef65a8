"""The public class ``Prepared``: one structure for each head, and checked arguments."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fastattn.files.formats import PathLike
from fastattn.prepared.files import write_prepared
from fastattn.prepared.heads import same_plan
from fastattn.prepared.protocol import PreparedHead
from fastattn.prepared.rows import Rows
from fastattn.prepared.tensor.exact import insert_factors
from fastattn.problem.batch import (
    Batch,
    check_mask,
    check_rows,
    check_unmasked,
    each_head,
    over_heads,
    pick,
    place_of_head,
    placed_mask,
)
from sketching._lib.arrays import Array, array_namespace, device_of, plain
from sketching._lib.cell import Cell
from sketching._lib.certificate import Approximation, Certificate
from sketching._lib.validation import check_float_array

_T = TypeVar("_T")


class Prepared:
    """Keys and values as a data structure for each head, made by :func:`prepare`.

    Thread safety: queries may run at the same time as each other and as one change;
    each is answered from the keys before or after the change. Changes are serialized.
    A change that raises, also ``KeyboardInterrupt``, leaves the structure as it was.

    Parameters
    ----------
    heads : list of PreparedHead
        One structure for each head, the last leading dimension fastest.
    like : array
        An empty array of the library, dtype and device of the queries to come.
    options : dict
        Sizes and the arguments of :func:`prepare`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import prepare
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = 0.3 * rng.standard_normal((3, 4096, 16))
    >>> prepared = prepare(key, value, queries=query[:512], tol=0.1, rng=0)
    >>> prepared.query(query[512:]).value.shape
    (3584, 16)
    """

    def __init__(
        self, heads: list[PreparedHead], like: Array, options: dict[str, Any]
    ) -> None:
        self._cell, self._like, self._options = Cell(heads), like, options

    def __copy__(self) -> "Prepared":
        """Return a copy that does not change with this structure."""
        return Prepared(self._heads, self._like, self._options)

    @property
    def _heads(self) -> list[PreparedHead]:
        # the list and its heads are replaced, never changed: readers load it once
        return self._cell.value

    def __repr__(self) -> str:
        return (
            f"<Prepared: {len(self._heads)} heads, {np.max(self.count)} keys, "
            f"{self.nbytes} bytes>"
        )

    @property
    def plan(self) -> Any:
        """The plan; for a batch an object array over the leading dimensions."""
        return over_heads([head.plan for head in self._heads], self._lead, object)

    @property
    def count(self) -> Any:
        """Number of keys; for a batch an array over the leading dimensions.

        Of tensor attention, an array over the factors too.
        """
        counts = np.array([head.count for head in self._heads], np.int64)
        found = counts.reshape(self._lead + counts.shape[1:])
        return found if found.ndim else int(found)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with held-out queries and recent keys."""
        return sum(head.nbytes for head in self._heads)

    @property
    def certificate(self) -> Certificate:
        """The certificate of an answer now, whether or not it meets the tolerance.

        A structure that has the keys computes the answers of some sample queries for
        it.
        """
        tol, guarantee = self._options["tol"], self._options["guarantee"]
        heads = self._heads
        found = self._each(lambda i: heads[i].certificate(tol, guarantee, self._rng(i)))
        return Certificate(
            over_heads([x.error for x in found], self._lead, np.float64),
            over_heads([x.failure for x in found], self._lead, np.float64),
            found[0].norm,
            over_heads([x.source for x in found], self._lead, object),
        )

    def query(self, query: Array) -> Approximation:
        """Answer queries.

        Parameters
        ----------
        query : array, shape (..., n, d)
            Queries, drawn like those that ``prepare`` was given; the leading
            dimensions broadcast to those of the structure.

        Returns
        -------
        Approximation
            As of :func:`approximate`. The certificate of a key-value state rests on
            held-out queries: it is about queries drawn like those of ``prepare``.

        Raises
        ------
        TypeError
            If the library or the dtype differs from that of the keys.
        ValueError
            If shapes do not match or the array is empty or not finite.
        RefusalError
            If the tolerance is missed for the keys inserted so far, or if queries are
            too far from those of ``prepare`` and the structure has no keys to compute
            them exactly.
        """
        query = self._checked("query", query, self._options["d"])
        tol, guarantee = self._options["tol"], self._options["guarantee"]
        heads = self._heads

        def answer(i: int) -> Any:
            own = pick(query, self._place(i))
            return heads[i].answer(own, tol, guarantee, self._rng(i))

        xp, p = array_namespace(query), self._options["p"]
        value = xp.empty((1, p), dtype=query.dtype, device=device_of(query))
        scale = self._options["scale"]
        batch = Batch(query, query, value, None, scale, False, self._lead)
        return batch.assemble(self._each(answer))

    def insert(
        self, key: Array, value: Array, *, key_mask: Array | None = None
    ) -> "Prepared":
        """Add keys and their values, all of them or none.

        Parameters
        ----------
        key, value : array, shapes (..., m, d), (..., m, p)
            The leading dimensions broadcast to those of the structure. Memory maps
            are read a block at a time, and copied only into a KV buffer. For tensor
            attention tuples, an entry for each factor, None for one that gets no keys:
            a new key of one factor makes tuples with all keys of the other factors.
        key_mask : boolean array, shape (..., m), optional
            True for keys that take part; a tuple for tensor attention.

        Returns
        -------
        Prepared
            The structure itself.

        Raises
        ------
        TypeError
            If the library or a dtype differs from that of the structure.
        ValueError
            If shapes do not match or an array is empty or not finite.
        RefusalError
            If keys or values are outside of the bounds of a proven certificate.
        """
        factors = self._options.get("factors")
        if factors is None:
            pair = self._checked_pair("", key, value, key_mask)

            def added(head: PreparedHead, i: int) -> PreparedHead:
                own = Rows.of(*pair, self._place(i))
                return own.insert_into(head, fold=False)
        else:
            pairs = self._checked_factors(factors, key, value, key_mask)

            def added(head: PreparedHead, i: int) -> PreparedHead:
                place = self._place(i)
                own = {s: Rows.of(*pair, place) for s, pair in pairs.items()}
                found: PreparedHead = insert_factors(head, own)
                return found

        self._cell.change(
            lambda heads: (self._each(lambda i: added(heads[i], i)), None)
        )
        return self

    def _checked_pair(
        self, which: str, key: Array, value: Array, key_mask: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Check keys with their values; ``which`` is the index of the factor."""
        key = self._checked(f"key{which}", key, self._options["d"])
        value = self._checked(f"value{which}", value, self._options["p"])
        check_rows(key, value)
        if key_mask is not None:
            name = f"key_mask{which}"
            check_mask(name, array_namespace(key), key_mask, key, key)
            key_mask = placed_mask(name, key_mask, self._lead)
            self._check_lead(name, key_mask.shape[:-1])
        return key, value, key_mask

    def _checked_factors(
        self, factors: int, keys: Any, values: Any, masks: Any
    ) -> dict[int, tuple[Array, Array, Array | None]]:
        """Check the keys of those factors that get some, by their indices."""
        masks = (None,) * factors if masks is None else masks
        for name, given in (("key", keys), ("value", values), ("key_mask", masks)):
            if not isinstance(given, tuple) or len(given) != factors:
                raise ValueError(
                    f"{name}: expected a tuple of {factors} entries, one for each "
                    "factor, None for one that gets no keys"
                )
        pairs = {}
        for s, pair in enumerate(zip(keys, values, masks, strict=True)):
            if (pair[0] is None) != (pair[1] is None):
                raise ValueError(f"value[{s}]: expected None where key[{s}] is None")
            if pair[0] is not None:
                pairs[s] = self._checked_pair(f"[{s}]", *pair)
        return pairs

    def merge(self, other: "Prepared") -> "Prepared":
        """Add the keys of another structure of the same plan.

        For tensor attention the keys of each factor are added to those of the same
        factor: answers are then over all tuples of the union, also over tuples that
        neither structure had.

        Parameters
        ----------
        other : Prepared
            Made by :meth:`empty` of this structure, or of one with the same plan; it
            stays as it is.

        Returns
        -------
        Prepared
            The structure itself.

        Raises
        ------
        ValueError
            If the plans differ.
        """
        if not isinstance(other, Prepared):
            raise TypeError(f"other: expected a Prepared, got {type(other).__name__}")
        array_namespace(self._like, other._like)
        for name, mine in self._options.items():
            if name != "seed" and other._options[name] != mine:
                raise ValueError(
                    f"other: expected a structure with {name}={mine!r}, got "
                    f"{other._options[name]!r}"
                )
        theirs = other._heads
        for one, two in zip(self._heads, theirs, strict=True):
            if not same_plan(one, two):
                raise ValueError(
                    f"other: {two.plan.method} was planned apart from "
                    f"{one.plan.method}, so that their sums cannot be added: prepare "
                    "once, start every other structure from prepared.empty(), which "
                    "can be saved and loaded elsewhere, and insert into that"
                )
        self._cell.change(
            lambda heads: (self._each(lambda i: heads[i].merge(theirs[i])), None)
        )
        return self

    def empty(self) -> "Prepared":
        """Return a structure with the same plan and without keys.

        Returns
        -------
        Prepared
            Structures from one plan can be merged.
        """
        heads = [head.empty() for head in self._heads]
        return Prepared(heads, self._like, self._options)

    def save(self, path: PathLike) -> None:
        """Write the structure to a file, whole or not at all.

        Parameters
        ----------
        path : str or path
            A name that ends in ``.npz``. The file holds plain arrays and a header in
            JSON, no pickles.

        Raises
        ------
        ValueError
            If the suffix is another.
        OSError
            If the file cannot be written.
        """
        write_prepared(path, self._heads, self._options)

    @property
    def _lead(self) -> tuple[int, ...]:
        return tuple(self._options["lead"])

    def _place(self, number: int) -> tuple[int, ...]:
        return place_of_head(number, self._lead)

    def _rng(self, number: int) -> np.random.Generator:
        # independent of earlier queries, and the same after a load
        return np.random.default_rng([self._options["seed"], number])

    def _each(self, work: Callable[[int], _T]) -> list[_T]:
        return each_head(self._lead, self._like, work)

    def _checked(self, name: str, x: Array, width: int) -> Array:
        """Check an array against the structure, also for NaN, a block at a time."""
        like = self._like
        array_namespace(like, x)
        check_unmasked(name, x)
        x = plain(x)
        if x.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype}, got {x.dtype}")
        if device_of(x) != device_of(like):
            raise TypeError(
                f"{name}: expected an array on {device_of(like)}, got {device_of(x)}"
            )
        check_float_array(name, x, least_ndim=2)
        if x.shape[-1] != width:
            raise ValueError(f"{name}: expected {width} columns, got shape {x.shape}")
        self._check_lead(name, x.shape[:-2])
        return x

    def _check_lead(self, name: str, lead: tuple[int, ...]) -> None:
        try:
            fits = np.broadcast_shapes(lead, self._lead) == self._lead
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}: leading dimensions {tuple(lead)} do not broadcast to "
                f"{self._lead}"
            )
