"""Studies of attention against torch: exact, bounded entries, proven, real heads."""

import numpy as np

import fastattn
from benches.cases import CASES
from benches.heads import real_heads
from benches.measure import exact_rows, faster, sdpa, spread


def _rows_error(answer, query, key, value, scale):
    """Relative error on 256 random rows."""
    rows = np.random.default_rng(7).choice(len(query), min(len(query), 256), False)
    truth = exact_rows(query, key, value, rows, scale=scale)
    return float(np.linalg.norm(answer[rows] - truth) / np.linalg.norm(truth))


def exact(*, quick):
    """Exact against torch: time of ours over theirs, over n and d."""
    rng, rows = np.random.default_rng(0), []
    for d in (64, 32):
        for n in (4096,) if quick else (4096, 8192, 16384, 32768):
            arrays = [rng.standard_normal((n, d)).astype(np.float32) for _ in range(3)]
            method = fastattn.Exact()

            def call(arrays=arrays, method=method):
                return fastattn.attention(*arrays, method=method, rng=0)

            error = _rows_error(call(), *arrays, d**-0.5)
            assert error < 1e-5
            pairs = 2 if quick else max(5, 65536 // n)
            ratio = faster(call, sdpa(*arrays, scale=d**-0.5), pairs=pairs)
            rows.append(
                {
                    "n": n,
                    "d": d,
                    "error": error,
                    **spread("time over torch", ratio.inverse),
                }
            )
    return rows


def bounded(*, quick):
    """Gaussian inputs with logit deviation 0.3 at tol 3e-2: times faster than torch."""
    rng, case, rows = np.random.default_rng(0), CASES["bounded"], []
    for n in (8192,) if quick else (16384, 65536):
        arrays = case.inputs(n, rng)

        def call(arrays=arrays):
            return fastattn.approximate(*arrays, scale=case.scale, tol=case.tol, rng=0)

        answer = call()
        error = _rows_error(answer.value, *arrays, case.scale)
        assert error <= case.tol
        ratio = faster(call, sdpa(*arrays, scale=case.scale), pairs=1 if quick else 7)
        rows.append(
            {
                "n": n,
                "method": str(answer.plan.method),
                "error": error,
                "certified": answer.certificate.error,
                **spread("times faster", ratio),
            }
        )
    return rows


def proven(*, quick):
    """Proven bounds at d=8, |logit| <= 1, tol 1e-4, and how close they come."""
    rng, rows = np.random.default_rng(0), []
    # torch takes minutes at the size of the full run
    n, pairs = (8192, 1) if quick else (131072, 3)
    for name in ("unit", "worst"):
        case = CASES[name]
        arrays = case.inputs(n, rng)

        def call(arrays=arrays, case=case):
            return fastattn.approximate(
                *arrays, scale=case.scale, tol=case.tol, guarantee="proven", rng=0
            )

        answer = call()
        sample = np.arange(0, n, max(1, n // 512))
        truth = exact_rows(*arrays, sample, scale=case.scale)
        error = float(np.abs(answer.value[sample] - truth).max())
        assert error <= answer.certificate.error

        def ours(arrays=arrays, case=case):
            return fastattn.attention(
                *arrays, scale=case.scale, method=fastattn.Exact(), rng=0
            )

        theirs = sdpa(*arrays, scale=case.scale)
        rows.append(
            {
                "input": name,
                "n": n,
                "method": str(answer.plan.method),
                "proven bound": answer.certificate.error,
                "realised": error,
                "bound over realised": answer.certificate.error / error,
                **spread("times faster than torch", faster(call, theirs, pairs=pairs)),
                **spread("times faster than Exact()", faster(call, ours, pairs=pairs)),
            }
        )
    return rows


def real(*, quick, data):
    """Every real head at three tolerances: realised error, method, times faster."""
    rows = []
    for head in real_heads(data, each=1 if quick else None):
        for tol in (1e-1,) if quick else (1e-1, 3e-2, 1e-2):

            def call(head=head, tol=tol):
                return fastattn.approximate(
                    *head.arrays, scale=head.scale, tol=tol, rng=0
                )

            answer = call()
            error = head.error(answer.value)
            pairs = 1 if quick else 3 if len(head) > 8192 else 5
            ratio = faster(call, sdpa(*head.arrays, scale=head.scale), pairs=pairs)
            rows.append(
                {
                    "head": head.name,
                    "n": len(head),
                    "tol": tol,
                    "realised": error,
                    "certified": answer.certificate.error,
                    "within": error <= tol,
                    "method": str(answer.plan.method),
                    **spread("times faster than torch", ratio),
                }
            )
    return rows
