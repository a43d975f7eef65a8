"""Prepared structures as .npz files: plain arrays and a header in JSON, no pickles."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.files.formats import PathLike, write_output
from fastattn.files.mapped import META
from fastattn.methods import exact
from fastattn.methods.multipole import method as multipole
from fastattn.methods.polynomial import method as polynomial
from fastattn.prepared.clusters.head import MultipoleHead, unpack_multipole
from fastattn.prepared.heads import ExactHead, StateHead
from fastattn.prepared.held_out import unpack_held_out
from fastattn.prepared.kv_buffer import KVBuffer
from fastattn.prepared.protocol import PreparedHead
from fastattn.prepared.proven import ProvenHead, unpack_proven
from fastattn.prepared.states import MonomialState, unpack_state
from fastattn.prepared.tensor.exact import TensorExactHead
from fastattn.prepared.tensor.states import TensorStateHead
from fastattn.problem.plan import Plan
from sketching._lib.archives import (
    check_total,
    members_of,
    read_member,
    read_text,
    reading,
)
from sketching._lib.arrays import Array, array_namespace, mover
from sketching._lib.files import CHECKSUMS, check_sums, checksum, naming_the_file
from sketching._lib.json_text import parse_object
from sketching._lib.validation import check_choice, check_integer, check_number

FORMAT = "fastattn.prepared"
# version 1 held predicted seconds in place of the work
VERSION = 2
_METHODS = {
    "Exact": exact.Exact,
    "Multipole": multipole.Multipole,
    "Polynomial": polynomial.Polynomial,
}
_KINDS: dict[str, Any] = {
    "exact": ExactHead,
    "multipole": MultipoleHead,
    "proven": ProvenHead,
    "summed": StateHead,
    "tensor-exact": TensorExactHead,
    "tensor-sums": TensorStateHead,
}


def write_prepared(
    path: PathLike, heads: list[PreparedHead], options: dict[str, Any]
) -> None:
    """Write heads and the options that they share, atomically."""
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
        CHECKSUMS: {name: checksum(np.asarray(x)) for name, x in arrays.items()},
        "format": FORMAT,
        "version": VERSION,
        "library": sys.modules["fastattn"].__version__,
        "options": options,
        "heads": headers,
    }
    write_output(path, arrays, header)


def read_header(path: PathLike, memory: int | None = None) -> dict[str, Any]:
    """Read and check the header; raise ValueError for other formats or newer versions.

    The file may unpack to at most ``memory`` bytes.
    """
    with naming_the_file(Path(path)), reading(Path(path)) as archive:
        members = members_of(archive)
        if META not in members:
            raise ValueError("holds no prepared structure: it has no header")
        most = check_total(Path(path), archive, memory)
        text = read_text(archive, META, members[META], most)
        header = parse_object("its header", text)
        if header.get("format") != FORMAT:
            raise ValueError(f"holds {header.get('format')!r}, expected {FORMAT!r}")
        number = header.get("version")
        if not isinstance(number, int) or number > VERSION:
            raise ValueError(
                f"has version {number!r} of the format, written by fastattn "
                f"{header.get('library')}; this one reads up to {VERSION}"
            )
        _check_options(header)
    return header


def _check_options(header: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless a header has the arguments of ``prepare``."""
    options, heads = header.get("options"), header.get("heads")
    if not isinstance(options, dict) or not isinstance(heads, list):
        raise ValueError("its header has no options, or no heads")
    if not all(isinstance(head, dict) for head in heads):
        raise ValueError("its header describes heads that are no JSON objects")
    lead = options.get("lead")
    if not isinstance(lead, list):
        raise ValueError(f"lead: expected a list of sizes, got {lead!r}")
    for size in lead:
        check_integer("lead", size, least=1)
    if math.prod(lead) != len(heads):
        raise ValueError(f"has {len(heads)} heads, its leading dimensions are {lead}")
    for name in ("d", "p"):
        check_integer(name, options.get(name), least=1)
    check_integer("seed", options.get("seed"), least=0)
    check_integer("factors", options.get("factors", 1), least=1)
    check_number("tol", options.get("tol"), above=0)
    check_number("scale", options.get("scale"))
    check_choice("guarantee", options.get("guarantee"), ("sampled", "proven"))


def read_heads(
    path: PathLike, header: dict[str, Any], like: Array, memory: int | None = None
) -> list[PreparedHead]:
    """Read the heads, for arrays of the library, device and dtype of ``like``."""
    with naming_the_file(Path(path)), reading(Path(path)) as archive:
        most = check_total(Path(path), archive, memory)
        arrays: list[dict[str, Array]] = [{} for _ in header["heads"]]
        for name, info in members_of(archive).items():
            number, _, own = name.partition("/")
            if name == META:
                continue
            if not (number.isdecimal() and own and int(number) < len(arrays)):
                raise ValueError(f"holds {name}, which belongs to no head")
            arrays[int(number)][own] = read_member(archive, name, info, most)
        try:
            found = [
                _unpack(own, values, like)
                for own, values in zip(arrays, header["heads"], strict=True)
            ]
        except (KeyError, IndexError) as error:
            raise ValueError(f"lacks {error}") from error
        # unpacking comes first: its messages say more than those of checksums
        for place, members in enumerate(arrays):
            check_sums({f"{place}/{name}": x for name, x in members.items()}, header)
            _check_widths(members, header["options"])
    return found


def _check_widths(arrays: dict[str, Array], options: dict[str, Any]) -> None:
    """Raise ``ValueError`` where arrays cannot be rows of queries, keys or values."""
    widths = {"probe_query": "d", "sample": "d", "key": "d", "tail_key": "d"}
    widths |= {"value": "p", "tail_value": "p"}
    for name, side in widths.items():
        x = arrays.get(name)
        if x is not None and (x.ndim != 2 or x.shape[1] != options[side]):
            raise ValueError(
                f"{name} has shape {x.shape}, expected {options[side]} columns"
            )
    for key, value in (("key", "value"), ("tail_key", "tail_value")):
        if key in arrays and len(arrays[key]) != len(arrays[value]):
            raise ValueError(f"{key} and {value} have different numbers of rows")


def _unpack(
    arrays: dict[str, Array], values: dict[str, Any], like: Array
) -> PreparedHead:
    """Make a head from its arrays and values."""
    move, plan = mover(like, like.dtype), _unpack_plan(values["plan"])
    if values["kind"] == "exact":
        buffer = _buffer(move(arrays["key"]), move(arrays["value"]))
        return ExactHead(plan, float(values["scale"]), buffer, move(arrays["sample"]))
    if values["kind"].startswith("tensor"):
        found: PreparedHead = _KINDS[values["kind"]].unpack(plan, arrays, values, like)
        return found
    if values["kind"] == "multipole":
        return unpack_multipole(plan, arrays, values, like)
    state = unpack_state(arrays, values, array_namespace(like))
    if values["kind"] == "proven":
        assert isinstance(state, MonomialState)
        return unpack_proven(plan, state, arrays, values)
    tail = _buffer(move(arrays["tail_key"]), move(arrays["tail_value"]))
    return StateHead(plan, state, tail, unpack_held_out(arrays, values, move))


def _buffer(key: Array, value: Array) -> KVBuffer:
    return KVBuffer(key, value, key.shape[0])


def _pack_plan(plan: Plan) -> dict[str, Any]:
    method = plan.method
    fields = {name: getattr(method, name) for name in type(method).__slots__}
    return {
        "method": type(method).__name__,
        "fields": fields,
        "predicted_error": plan.predicted_error,
        "work": plan.work,
        "reason": plan.reason,
    }


def _unpack_plan(packed: dict[str, Any]) -> Plan:
    method = _METHODS[packed["method"]](**packed["fields"])
    return Plan(
        method,
        float(packed["predicted_error"]),
        # the seconds of version 1 were those of another machine
        float(packed.get("work", math.nan)),
        packed["reason"],
    )
