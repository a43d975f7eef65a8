"""Prepared structures as .npz files: plain arrays and a header in JSON, no pickles."""

import sys
import zipfile
from pathlib import Path
from typing import Any

from numpy.lib import format as npy

from fastattn import exact, multipole, polynomial
from fastattn._input_files import parse_object
from fastattn._kept import Kept
from fastattn._prepared_heads import (
    ExactHead,
    PreparedHead,
    SummedHead,
    unpack_probes,
)
from fastattn._prepared_multipole import MultipoleHead, unpack_multipole
from fastattn._prepared_proven import ProvenHead, unpack_proven
from fastattn._problem import Plan
from fastattn._sums import MonomialSums, unpack_sums
from fastattn._tensor_prepared import TensorExactHead
from fastattn._tensor_prepared_sums import TensorSumsHead
from fastattn.formats import PathLike, write_output
from sketching._lib.arrays import Array, array_namespace, mover
from sketching._lib.files import naming_the_file

FORMAT = "fastattn.prepared"
VERSION = 1
_METHODS = {
    "Exact": exact.Exact,
    "Multipole": multipole.Multipole,
    "Polynomial": polynomial.Polynomial,
}
_KINDS: dict[str, Any] = {
    "exact": ExactHead,
    "multipole": MultipoleHead,
    "proven": ProvenHead,
    "summed": SummedHead,
    "tensor-exact": TensorExactHead,
    "tensor-sums": TensorSumsHead,
}


def write_prepared(
    path: PathLike, heads: list[PreparedHead], options: dict[str, Any]
) -> None:
    """Write heads and the options that they share, whole or not at all."""
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"{path}: expected a file name that ends in .npz")
    arrays: dict[str, Array] = {}
    headers = []
    for number, head in enumerate(heads):
        own, values = head.pack()
        arrays |= {f"{number}/{name}": x for name, x in own.items()}
        kind = next(name for name, of in _KINDS.items() if isinstance(head, of))
        headers.append({"kind": kind, "plan": _pack_plan(head.plan), **values})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "library": sys.modules[__package__].__version__,
        "options": options,
        "heads": headers,
    }
    write_output(path, arrays, header)


def read_header(path: PathLike) -> dict[str, Any]:
    """Read what a file says of itself; refuse files that are not ours, or newer."""
    with naming_the_file(Path(path)), zipfile.ZipFile(path) as archive:
        if "meta.npy" not in archive.namelist():
            raise ValueError("holds no prepared structure: it has no header")
        with archive.open("meta.npy") as member:
            text = str(npy.read_array(member, allow_pickle=False))
        header = parse_object("its header", text)
        if header.get("format") != FORMAT:
            raise ValueError(f"holds {header.get('format')!r}, expected {FORMAT!r}")
        number = header.get("version")
        if not isinstance(number, int) or number > VERSION:
            raise ValueError(
                f"has version {number!r} of the format, written by fastattn "
                f"{header.get('library')}; this one reads up to {VERSION}"
            )
    return header


def read_heads(
    path: PathLike, header: dict[str, Any], like: Array
) -> list[PreparedHead]:
    """Read the heads, for arrays of the library, device and dtype of ``like``."""
    with naming_the_file(Path(path)), zipfile.ZipFile(path) as archive:
        arrays: list[dict[str, Array]] = [{} for _ in header["heads"]]
        for name in archive.namelist():
            number, _, own = name.removesuffix(".npy").partition("/")
            if own:
                with archive.open(name) as member:
                    array = npy.read_array(member, allow_pickle=False)
                arrays[int(number)][own] = array
        try:
            return [
                _unpack(own, values, like)
                for own, values in zip(arrays, header["heads"], strict=True)
            ]
        except (KeyError, IndexError) as error:
            raise ValueError(f"lacks {error}") from error


def _unpack(
    arrays: dict[str, Array], values: dict[str, Any], like: Array
) -> PreparedHead:
    """Make a head again."""
    move, plan = mover(like, like.dtype), _unpack_plan(values["plan"])
    if values["kind"] == "exact":
        kept = _kept(move(arrays["key"]), move(arrays["value"]))
        return ExactHead(plan, float(values["scale"]), kept, move(arrays["sample"]))
    if values["kind"].startswith("tensor"):
        found: PreparedHead = _KINDS[values["kind"]].unpack(plan, arrays, values, like)
        return found
    if values["kind"] == "multipole":
        return unpack_multipole(plan, arrays, values, like)
    sums = unpack_sums(arrays, values, array_namespace(like))
    if values["kind"] == "proven":
        assert isinstance(sums, MonomialSums)
        return unpack_proven(plan, sums, arrays, values)
    tail = _kept(move(arrays["tail_key"]), move(arrays["tail_value"]))
    return SummedHead(plan, sums, tail, unpack_probes(arrays, values, move))


def _kept(key: Array, value: Array) -> Kept:
    return Kept(key, value, key.shape[0])


def _pack_plan(plan: Plan) -> dict[str, Any]:
    method = plan.method
    fields = {name: getattr(method, name) for name in type(method).__slots__}
    return {
        "method": type(method).__name__,
        "fields": fields,
        "predicted_error": plan.predicted_error,
        "predicted_seconds": plan.predicted_seconds,
        "reason": plan.reason,
    }


def _unpack_plan(packed: dict[str, Any]) -> Plan:
    method = _METHODS[packed["method"]](**packed["fields"])
    return Plan(
        method,
        packed["predicted_error"],
        packed["predicted_seconds"],
        packed["reason"],
    )
