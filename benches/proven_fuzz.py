"""Proven certificates attacked: extreme scales, shapes and masks, exact logits.

Inputs are small, so that many answers can be compared; entries range from the least
denormal to the largest number of a dtype, within one array too.
"""

import math
from dataclasses import dataclass, field

import numpy as np

import fastattn
from benches import rational
from benches.measure import torch_or_none
from benches.progress import steps
from fastattn import (
    Exact,
    PathAttention,
    Polynomial,
    RefusalError,
    StrassenAttention,
    TensorWindow,
)

_COUNT, _QUICK = 100_000, 1_000
_TOLS = 1e-6, 1e-3, 1e-2, 1e-1, 0.5
# rounding of long double itself, relative to the largest value
_ORACLE = 1e-18


@dataclass(frozen=True, eq=False)
class Case:
    """One call, and its exact answer."""

    kind: str
    arrays: tuple
    options: dict
    truth: np.ndarray
    logarithm: np.ndarray
    library: str
    dtype: str

    def run(self):
        """Answer it, as an Approximation."""
        arrays = self._moved(self.arrays)
        options = dict(self.options)
        if "key_mask" in options:
            options["key_mask"] = self._moved(options["key_mask"])
        if self.kind == "prepared":
            query, key, value = arrays
            half = len(key) // 2
            prepared = fastattn.prepare(key, value, queries=query, **options)
            if not half:
                return prepared.query(query)
            parts = [prepared.empty() for _ in range(2)]
            for part, rows in zip(parts, (slice(half), slice(half, None)), strict=True):
                part.insert(key[rows], value[rows])
            return parts[0].merge(parts[1]).query(query)
        if self.kind == "merged":
            query, key, value = arrays
            half = len(key) // 2
            parts = [
                fastattn.approximate(query, key[rows], value[rows], **options)
                for rows in (slice(half), slice(half, None))
                if len(key[rows])
            ]
            return fastattn.merge_answers(parts)
        return fastattn.approximate(*arrays, **options)

    def _moved(self, x):
        """Bring an array, or a tuple of them, to the library."""
        if self.library == "numpy":
            return x
        if isinstance(x, tuple):
            return tuple(map(self._moved, x))
        torch = torch_or_none()
        found = torch.from_numpy(x)
        is_short = self.dtype == "bfloat16" and x.dtype != bool
        return found.to(torch.bfloat16) if is_short else found


@dataclass(eq=False)
class Tally:
    """Counts of the outcomes of calls of one kind."""

    proven: int = 0
    sampled: int = 0
    refused: int = 0
    beyond: list = field(default_factory=list)
    sampled_beyond: int = 0
    logarithms_beyond: list = field(default_factory=list)


def proven_fuzz(*, quick, count):
    """Compare proven answers to random extreme inputs with exact logits.

    Answers with failure 0 are counted until there are ``--count`` of them; each
    error beyond its certificate is a fault. Sampled answers, given where nothing could
    be proven, are counted separately.
    """
    count = count or (_QUICK if quick else _COUNT)
    tallies, seed = {}, 0
    with steps("answers", count) as step:
        while sum(x.proven for x in tallies.values()) < count:
            case = draw(seed)
            seed += 1
            tally = tallies.setdefault((case.kind, case.dtype), Tally())
            before = tally.proven
            judge(case, tally, seed - 1)
            if tally.proven > before:
                step()
    rows = [
        {
            "kind": kind,
            "dtype": dtype,
            "proven answers": x.proven,
            "beyond": len(x.beyond),
            "refused": x.refused,
            "sampled answers": x.sampled,
            "sampled beyond": x.sampled_beyond,
            "log-sum-exps beyond": len(x.logarithms_beyond),
        }
        for (kind, dtype), x in sorted(tallies.items())
    ]
    beyond = [found for x in tallies.values() for found in x.beyond]
    print(f"{count} proven answers of {seed} calls, {len(beyond)} beyond: {beyond[:9]}")
    return rows


def judge(case, tally, seed):
    """Run a case and count its outcome."""
    try:
        with np.errstate(all="ignore"):
            answer = case.run()
    except RefusalError:
        tally.refused += 1
        return
    except ValueError as error:
        # parts whose weights are beyond the dtype cannot be merged
        if case.kind != "merged" or "log_normalizer" not in str(error):
            raise
        tally.refused += 1
        return
    certificate = answer.certificate
    if not math.isfinite(certificate.error):
        tally.refused += 1
        return
    got = _host(answer.value)
    error, slack = _error(certificate.norm, got, case.truth)
    holds = error <= certificate.error + slack
    if certificate.failure > 0:
        tally.sampled += 1
        tally.sampled_beyond += not holds
        return
    tally.proven += 1
    if not holds:
        tally.beyond.append((seed, float(error), float(certificate.error)))
    if answer.log_normalizer_error is not None:
        given, known = map(_host, (answer.log_normalizer, answer.log_normalizer_error))
        with np.errstate(invalid="ignore"):
            off = np.abs(given - case.logarithm)
        # rows that see no key have minus infinity
        right = (off <= known) | (given == case.logarithm) | (known == np.inf)
        if not np.all(right):
            tally.logarithms_beyond.append(seed)


def _error(norm, got, truth):
    """Error of an answer, and the rounding error of the reference."""
    off = got - truth
    if norm == "max":
        return np.max(np.abs(off)), _ORACLE * np.max(np.abs(truth))
    peak = max(np.max(np.abs(off)), np.max(np.abs(truth)))
    if peak == 0 or np.max(np.abs(off)) == 0:
        return 0.0, 0.0
    size = np.sqrt(np.sum((truth / peak) ** 2))
    error = np.sqrt(np.sum((off / peak) ** 2))
    return (error / size if size > 0 else np.inf), 10 * _ORACLE


def draw(seed):
    """Make one case from a seed."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(
        ["attention", "causal", "masked", "prepared", "merged", "tensor", "mechanism"],
        p=[0.3, 0.15, 0.1, 0.1, 0.1, 0.15, 0.1],
    )
    library, dtype = _dtype(rng)
    if kind in ("tensor", "mechanism"):
        return _tensor_case(str(kind), library, dtype, rng)
    n, m, d, p = _sizes(rng)
    scale, (query, key) = _logit_sides(rng, dtype, d, (n, m))
    value = _values(rng, dtype, (m, p))
    options = _options(rng, [Exact(), Polynomial(), None], scale)
    seen = np.ones((n, m), bool)
    if kind == "causal":
        options["is_causal"] = True
        seen &= np.arange(m) <= np.arange(n)[:, None]
    if kind == "masked":
        mask = rng.random(m) < rng.choice([0.2, 0.5, 0.8])
        options["key_mask"] = mask
        seen &= mask
    if kind in ("prepared", "merged"):
        options["guarantee"] = "proven"
    factor = d**-0.5 if scale is None else scale
    truth = rational.attention(query, key, value, factor, seen)
    return Case(str(kind), (query, key, value), options, *truth, library, dtype)


def _tensor_case(kind, library, dtype, rng):
    factors = 2 if kind == "mechanism" or rng.random() < 0.8 else 3
    n, d, p = (int(rng.integers(1, 4)) for _ in range(3))
    lengths = [int(rng.integers(1, 5)) for _ in range(factors)]
    scale, (query, *keys) = _logit_sides(rng, dtype, d, (n, *lengths))
    values = tuple(_values(rng, dtype, (m, p)) for m in lengths)
    methods, form = [Exact(), Polynomial(), None], "product"
    seen = np.ones((n, math.prod(lengths)), bool)
    if kind == "mechanism":
        sizes = tuple(int(rng.integers(1, 4)) for _ in lengths)
        method = rng.choice(
            np.array([PathAttention(), StrassenAttention(), TensorWindow(sizes)])
        )
        methods = [method]
        form = {PathAttention: "path", StrassenAttention: "cycle"}.get(
            type(method), "product"
        )
        if isinstance(method, TensorWindow):
            seen = _tuples_seen(n, lengths, sizes)
    options = _options(rng, methods, scale)
    if kind == "tensor" and rng.random() < 0.2:
        options["is_causal"] = True
        seen = _tuples_seen(n, lengths, [n] * factors)
    factor = 1 / d if scale is None else scale
    truth = rational.tensor_attention(query, keys, values, factor, seen, form)
    return Case(kind, (query, tuple(keys), values), options, *truth, library, dtype)


def _tuples_seen(n, lengths, sizes):
    """Which tuples rows see that see the last keys, a given number, of each factor."""
    seen = np.ones((n, 1), bool)
    row = np.arange(n)[:, None]
    for m, size in zip(lengths, sizes, strict=True):
        number = np.arange(m)
        own = (number <= row) & (number > row - max(size, 1))
        seen = (seen[:, :, None] & own[:, None, :]).reshape(n, -1)
    return seen


def _dtype(rng):
    """A library and the dtype of its arrays; half of them as NumPy has them."""
    library = "torch" if torch_or_none() and rng.random() < 0.15 else "numpy"
    names = ["float32", "float64", "float16"]
    name = rng.choice(names, p=[0.5, 0.35, 0.15])
    if library == "torch" and name == "float16":
        name = "bfloat16"
    return library, str(name)


def _sizes(rng):
    """Numbers of queries, keys, coordinates and columns; few are large."""
    n, m = (int(rng.choice([1, 2, 3, 5, 9])) for _ in range(2))
    if rng.random() < 0.02:
        m = int(rng.choice([40, 330, 700]))
    d = int(rng.choice([1, 2, 3, 4, 8]))
    # tiles serve columns in eights
    return n, m, d, int(rng.choice([1, 2, 8, 16], p=[0.4, 0.3, 0.25, 0.05]))


def _options(rng, methods, scale):
    return {
        "method": methods[int(rng.integers(len(methods)))],
        "guarantee": "proven" if rng.random() < 0.85 else "sampled",
        "tol": float(rng.choice(_TOLS)),
        "scale": scale,
        "rng": 0,
    }


def _logit_sides(rng, dtype, d, lengths):
    """A scale, or None, and sides whose products are often of moderate size."""
    low, high = _powers(dtype)
    powers = [rng.uniform(low, high) for _ in lengths]
    kind = rng.choice(["none", "one", "any"], p=[0.5, 0.2, 0.3])
    scale = {"none": None, "one": 1.0, "any": 0.0}[str(kind)]
    if scale == 0.0:
        scale = float(rng.choice([1, -1])) * 10.0 ** rng.uniform(-30, 30)
    if rng.random() < 0.01:
        scale = 0.0
    if rng.random() < 0.7:
        # the last side compensates the others
        logits = rng.uniform(-3, 2)
        own = 0.0 if not scale else math.log10(abs(scale))
        for _ in range(20):
            powers[-1] = logits - own - sum(powers[:-1])
            if low <= powers[-1] <= high:
                break
            powers[:-1] = [rng.uniform(low, high) for _ in powers[1:]]
    return scale, [
        _entries(rng, dtype, (rows, d), power)
        for rows, power in zip(lengths, powers, strict=True)
    ]


def _values(rng, dtype, shape):
    x = _entries(rng, dtype, shape, rng.uniform(*_powers(dtype)))
    kind = rng.random()
    if kind < 0.12:
        x[:] = x.flat[0]
    elif kind < 0.2:
        # equal but for the last place
        x[:] = x.flat[0]
        # towards zero: the largest number has none above it
        x.flat[-1] = np.nextafter(x.flat[0], x.dtype.type(0))
    elif kind < 0.25:
        x[:, -1] = x[0, -1]
    # of bfloat16, a neighbour is rounded once more
    return _fitted(x, dtype)


def _powers(dtype):
    """Decimal exponents of the least and the largest numbers."""
    if dtype == "float16":
        return -8.0, 4.8
    return (-46.0, 38.5) if dtype in ("float32", "bfloat16") else (-324.0, 308.2)


def _entries(rng, dtype, shape, power):
    """Numbers of about ``10 ** power``, some far from it."""
    x = rng.standard_normal(shape) if rng.random() < 0.7 else rng.uniform(0, 1, shape)
    exponents = np.full(shape, power)
    kind = rng.random()
    if kind < 0.1:
        exponents = exponents + rng.normal(0, 3, shape)
    elif kind < 0.2:
        exponents = exponents + rng.normal(0, 6, shape[1])
    elif kind < 0.25:
        exponents = exponents + rng.normal(0, 6, (shape[0], 1))
    elif kind < 0.3:
        exponents.flat[rng.integers(exponents.size)] += rng.uniform(2, 40)
    elif kind < 0.35:
        exponents = rng.uniform(*_powers(dtype), shape)
    if rng.random() < 0.15:
        x = x * (rng.random(shape) < 0.5)
    if rng.random() < 0.1:
        x[:] = x[0]
    if rng.random() < 0.05:
        x[:] = np.sign(x.flat[0]) or 1.0
    with np.errstate(all="ignore"):
        # in two steps: a power of ten may be no number itself
        half = exponents / 2
        return _fitted(x * 10.0**half * 10.0 ** (exponents - half), dtype)


def _fitted(x, dtype):
    """Round to a dtype, as NumPy holds it, within its range."""
    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            info = np.finfo(dtype)
            return np.nan_to_num(np.clip(x, info.min, info.max)).astype(dtype)
        # the upper half of a float32, cut off
        most = np.finfo(np.float32).max
        words = np.nan_to_num(np.clip(x, -most, most)).astype(np.float32)
        return (words.view(np.uint32) & 0xFFFF0000).view(np.float32)


def _host(x):
    """A NumPy array in long double."""
    if not isinstance(x, np.ndarray):
        x = x.to(torch_or_none().float64).numpy()
    return x.astype(rational.LONG)
