"""Studies of tensor attention: growth, times faster than exact, and orders."""

import numpy as np

import fastattn
from benches.measure import Ratio, exponent, faster, peak_memory, seconds, spread
from fastattn import Exact, Polynomial, RefusalError
from fastattn.methods.polynomial.expansions import (
    LARGEST_BOUND,
    rank_of,
    relative_minimax,
)

# of the first study: with scale 1/d and entries in [-1, 1] logits are in [-1, 1]
_D, _TOL = 8, 1e-3
# of wide heads: the largest rank, the tolerance, and n of the extrapolated ratio
_RANK, _WIDE_TOL, _FAR = 4096, 1e-2, 65536
# of a tolerance that is relative to the answer
_SAMPLED_TOL = 1e-2
# of the orders: degrees in so many coordinates
_DEGREES, _FEW = (4, 6, 8), 4


def inputs(n, d, rng, *, bound=1.0):
    """Order 3: entries of query and keys uniform up to a bound, values up to 1."""
    query, *keys = (rng.uniform(-bound, bound, (n, d)) for _ in range(3))
    values = tuple(rng.uniform(-1, 1, (n, d)).astype(np.float32) for _ in keys)
    return query.astype(np.float32), tuple(x.astype(np.float32) for x in keys), values


def proven(arrays, tol, method=None):
    """Answer with a proven bound, which Auto() seeks by default."""
    return fastattn.approximate(
        *arrays, tol=tol, method=method, guarantee="proven", rng=0
    )


_GROWTH = """
import json, os, time
import numpy as np
from benches.measure import threads
from benches.tensor import inputs, proven

arrays = inputs({n}, {d}, np.random.default_rng(0))
with threads(1):
    proven(inputs(4096, {d}, np.random.default_rng(0)), {tol})
    # resident pages now: interpreter, inputs, compiled code
    pages = int(open("/proc/self/statm").read().split()[1])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = proven(arrays, {tol})
        times.append(time.perf_counter() - start)
# not getrusage: there a process starts with the peak of the one that started it
status = open("/proc/self/status").read()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
extra = peak - pages * os.sysconf("SC_PAGE_SIZE")
print(json.dumps([min(times), extra / 1e6, answer.certificate.error]))
"""


def tensor(*, quick):
    """d=8, entries in [-1, 1], tol 1e-3 proven: growth side by side, times faster."""
    rng = np.random.default_rng(0)
    small = (128, 256) if quick else (256, 512, 1024, 2048)
    large = (4096, 16384) if quick else (4096, 16384, 65536, 262144)
    rows = []
    taken = []
    for n in small:
        arrays = inputs(n, _D, rng)
        exact, ours = _call(arrays, Exact()), _call(arrays, Polynomial())
        answer, truth = ours(), exact()
        error = _distance(answer.value, truth.value)
        assert error <= answer.certificate.error + truth.certificate.error
        taken.append(min(seconds(exact) for _ in range(1 if n > 1024 else 5)))
        row = _row("Exact()", n, taken, truth.certificate.error)
        row["of Polynomial(): error"] = error
        ratio = faster(ours, exact, pairs=3 if n > 1024 else 5)
        row |= spread("times faster", ratio)
        rows.append(row)
    _fit(rows, small, taken)
    grown = []
    taken = []
    for n in large:
        time, extra, error = peak_memory(_GROWTH.format(n=n, d=_D, tol=_TOL))
        taken.append(time)
        grown.append(_row("Polynomial()", n, taken, error) | {"MB": extra})
    _fit(grown, large, taken)
    return rows + grown


def tensor_sampled(*, quick):
    """d=8, entries in [-1, 1], tol 1e-2 of the answer's norm: times faster than exact.

    Values of either sign average out: their range is large against the answer's norm.
    """
    rows = []
    for n in (384,) if quick else (1536,):
        arrays = inputs(n, _D, np.random.default_rng(0))
        ours, exact = (
            lambda arrays=arrays, method=method: fastattn.approximate(
                *arrays, tol=_SAMPLED_TOL, method=method, rng=0
            )
            for method in (None, Exact())
        )
        answer, truth = ours(), exact().value.astype(np.float64)
        error = float(np.linalg.norm(answer.value - truth) / np.linalg.norm(truth))
        assert error <= answer.certificate.error <= _SAMPLED_TOL
        rows.append(
            {
                "n": n,
                "tol": _SAMPLED_TOL,
                "method": str(answer.plan.method),
                "certified": answer.certificate.error,
                "failure": answer.certificate.failure,
                "error": error,
                **spread("times faster", faster(ours, exact, pairs=3)),
            }
        )
        print(f"n={n}: {rows[-1]['times faster']:.0f} times faster than exact")
    return rows


def tensor_wide(*, quick):
    """d=32 and 64: entries up to where tol 1e-2 is proven by rank 4096 at the most."""
    rng = np.random.default_rng(0)
    n = 256 if quick else 1024
    return [_wide(n, d, rng) for d in (32, 64)]


def tensor_order(*, quick):
    """Largest entries, scale 1/d, within a fixed rank for orders 2, 3 and 4."""
    rows = []
    for degree in _DEGREES:

        def serves(bound, degree=degree):
            # relative error of the weights: before rounding, for any values
            return relative_minimax(degree, bound)[1] <= _WIDE_TOL / (1 + _WIDE_TOL)

        bound = _largest(serves, LARGEST_BOUND)
        row = {
            "d": _FEW,
            "degree": degree,
            "rank": rank_of(_FEW, degree),
            "largest logit": bound,
        }
        for order in (2, 3, 4):
            entry = bound ** (1 / order)
            _check_order(order, entry, degree)
            row[f"entries, order {order}"] = entry
        rows.append(row)
    return rows


def _wide(n, d, rng):
    """The largest bound of the entries for one width, and the times there."""
    degree = max(g for g in range(1, 9) if rank_of(d, g) <= _RANK)
    method = Polynomial(degree=degree)
    unit = inputs(n, d, rng)

    def scaled(bound):
        query, keys, values = unit
        return query * bound, tuple(x * bound for x in keys), values

    def serves(bound):
        try:
            proven(scaled(bound), _WIDE_TOL, method)
        except RefusalError:
            return False
        return True

    bound = _largest(serves, 4.0)
    arrays = scaled(0.98 * bound)
    ours, exact = _call(arrays, method, _WIDE_TOL), _call(arrays, Exact(), _WIDE_TOL)
    realised = _distance(ours().value, exact().value)
    assert realised <= ours().certificate.error + exact().certificate.error
    ratio = faster(ours, exact, pairs=3)
    return {
        "d": d,
        "degree": degree,
        "rank": rank_of(d, degree),
        "entries up to": bound,
        "proven": ours().certificate.error,
        "realised": realised,
        "n": n,
        **spread("times faster than Exact()", ratio),
        # exact grows by the cube, the polynomial in proportion
        f"extrapolated to n={_FAR}": ratio.median * (_FAR / n) ** 2,
    }


def _largest(serves, most):
    """Bisect for the largest number that satisfies a condition."""
    low, high = 0.0, most
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def _check_order(order, entry, degree):
    """Check the bound at the corners, where logits are largest."""
    rng = np.random.default_rng(order)
    query, *keys = (
        0.99 * entry * rng.choice([-1.0, 1.0], (32, _FEW)) for _ in range(order)
    )
    values = tuple(rng.uniform(-1, 1, (32, _FEW)) for _ in keys)
    arrays = query, tuple(keys), values
    answer = proven(arrays, _WIDE_TOL, Polynomial(degree=degree))
    truth = proven(arrays, _WIDE_TOL, Exact())
    assert _distance(answer.value, truth.value) <= answer.certificate.error


def _call(arrays, method, tol=_TOL):
    return lambda: proven(arrays, tol, method)


def _distance(answer, truth):
    return float(np.abs(answer.astype(np.float64) - truth).max())


def _row(method, n, taken, error):
    return {
        "method": method,
        "n": n,
        "time over the first": taken[-1] / taken[0],
        "fitted exponent": 0.0,
        "proven": error,
        "of Polynomial(): error": "",
        **dict.fromkeys(spread("times faster", Ratio(1, 1, 1)), ""),
        "MB": "",
    }


def _fit(rows, sizes, taken):
    """Write the slope of log time against log size into every row."""
    slope = exponent(list(sizes), taken)
    for row in rows:
        row["fitted exponent"] = slope
