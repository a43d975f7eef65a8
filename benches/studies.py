"""The studies: each returns rows of one table, correct answers only."""

import json
import subprocess
import sys

import numpy as np

import fastattn
from benches.cases import CASES
from benches.causal import causal
from benches.clustering import clustering
from benches.decoding import decoding, decoding_clusters
from benches.distances import distances
from benches.gradients import gradients
from benches.hardness import audit, decisions, reductions
from benches.heads import real_heads
from benches.kernel_features import kernel_features
from benches.linear import linear
from benches.linear_heads import linear_heads
from benches.lowdim import lowdim
from benches.measure import (
    exact_rows,
    exponent,
    faster,
    peak_memory,
    sdpa,
)
from benches.peers import peers
from benches.real_heads import diffuse, sharp
from benches.seeds import seeds
from benches.softmax_vs_linear import recall, softmax_vs_linear
from benches.streaming import streaming
from benches.tensor import tensor, tensor_order, tensor_wide
from benches.threshold import threshold


def _rows_error(answer, query, key, value, scale):
    """Relative error on 256 random rows."""
    rows = np.random.default_rng(7).choice(len(query), min(len(query), 256), False)
    truth = exact_rows(query, key, value, rows, scale=scale)
    return float(np.linalg.norm(answer[rows] - truth) / np.linalg.norm(truth))


def exact(*, quick, data):
    """Exact against torch: time of ours over theirs, over n and d."""
    rng, rows = np.random.default_rng(0), []
    for d in (64, 32):
        for n in (4096, 8192) if quick else (4096, 8192, 16384, 32768):
            arrays = [rng.standard_normal((n, d)).astype(np.float32) for _ in range(3)]
            method = fastattn.Exact()

            def call(arrays=arrays, method=method):
                return fastattn.attention(*arrays, method=method, rng=0)

            error = _rows_error(call(), *arrays, d**-0.5)
            assert error < 1e-5
            ratio = faster(call, sdpa(*arrays, scale=d**-0.5), pairs=max(5, 65536 // n))
            rows.append(
                {
                    "n": n,
                    "d": d,
                    "error": error,
                    "time over torch": 1 / ratio.median,
                    "least": 1 / ratio.high,
                    "most": 1 / ratio.low,
                }
            )
    return rows


def bounded(*, quick, data):
    """Gaussian inputs with logit deviation 0.3 at tol 3e-2: times faster than torch."""
    rng, case, rows = np.random.default_rng(0), CASES["bounded"], []
    for n in (16384,) if quick else (16384, 65536):
        arrays = case.inputs(n, rng)

        def call(arrays=arrays):
            return fastattn.approximate(*arrays, scale=case.scale, tol=case.tol, rng=0)

        answer = call()
        error = _rows_error(answer.value, *arrays, case.scale)
        assert error <= case.tol
        ratio = faster(call, sdpa(*arrays, scale=case.scale), pairs=7)
        rows.append(
            {
                "n": n,
                "method": str(answer.plan.method),
                "error": error,
                "certified": answer.certificate.error,
                "times faster": ratio.median,
                "least": ratio.low,
                "most": ratio.high,
            }
        )
    return rows


def proven(*, quick, data):
    """Proven bounds at d=8, |logit| <= 1, tol 1e-4, and how close they come."""
    rng, rows = np.random.default_rng(0), []
    n = 16384 if quick else 131072
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

        rows.append(
            {
                "input": name,
                "n": n,
                "method": str(answer.plan.method),
                "proven bound": answer.certificate.error,
                "realised": error,
                "bound over realised": answer.certificate.error / error,
                "times faster than torch": faster(
                    call, sdpa(*arrays, scale=case.scale), pairs=3
                ).median,
                "than Exact()": faster(call, ours, pairs=3).median,
            }
        )
    return rows


_GROWTH = """
import json, os, time
import numpy as np
import fastattn
from fastattn import Polynomial

n = {n}
rng = np.random.default_rng(0)
query, key, value = (rng.standard_normal((n, 64), dtype=np.float32) for _ in range(3))
method = Polynomial(degree=2, basis="hermite")
call = lambda a: fastattn.approximate(
    *a, scale=0.3 / 8, tol=3e-2, method=method, rng=0
)
call([x[:16384] for x in (query, key, value)])
# resident pages now: interpreter, inputs, compiled code
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
start = time.perf_counter()
answer = call((query, key, value))
seconds = time.perf_counter() - start
# not getrusage: there a process starts with the peak of the one that started it
status = open("/proc/self/status").read()
peak = int(status.partition("VmHWM:")[2].split()[0])
extra = peak * 1024 - before - answer.value.nbytes - answer.log_normalizer.nbytes
print(json.dumps({{
    "n": n, "seconds": seconds, "extra_bytes": extra,
    "certified": float(answer.certificate.error),
}}))
"""


def growth(*, quick, data):
    """Time and memory of the polynomial method at fixed settings, by process."""
    sizes = (16384, 65536) if quick else (16384, 65536, 262144, 1048576)
    found = [peak_memory(_GROWTH.format(n=n)) for n in sizes]
    slope = exponent(list(sizes), [row["seconds"] for row in found])
    return [
        {
            "n": row["n"],
            "time over the first": row["seconds"] / found[0]["seconds"],
            "MB beyond inputs and output": row["extra_bytes"] / 1e6,
            "certified": row["certified"],
            "fitted exponent": slope,
        }
        for row in found
    ]


def real(*, quick, data):
    """Every real head at three tolerances: realised error, method, times faster."""
    rows = []
    for head in real_heads(data):
        for tol in (1e-1, 3e-2, 1e-2):

            def call(head=head, tol=tol):
                return fastattn.approximate(
                    *head.arrays, scale=head.scale, tol=tol, rng=0
                )

            answer = call()
            error = head.error(answer.value)
            pairs = 1 if quick or len(head) > 8192 else 3
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
                    "times faster than torch": ratio.median,
                }
            )
    return rows


def imports(*, quick):
    """Time of `import fastattn`, and with its main names; what it must not load."""
    code = (
        "import time; s = time.perf_counter(); import fastattn; "
        "t = time.perf_counter() - s; fastattn.attention, fastattn.Auto; "
        "u = time.perf_counter() - s; import sys, json; "
        "print(json.dumps([t, u, [m for m in ('numba', 'scipy', 'sklearn', 'cupy', "
        "'matplotlib') if m in sys.modules]]))"
    )
    command = [sys.executable, "-c", code]
    found = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(3 if quick else 11)
    ]
    return [
        {
            "milliseconds, median": 1e3 * float(np.median([x[0] for x in found])),
            "with attention and Auto": 1e3 * float(np.median([x[1] for x in found])),
            "least of that": 1e3 * min(x[1] for x in found),
            "heavy modules loaded": found[0][2],
        }
    ]


STUDIES = {
    "exact": exact,
    "bounded": bounded,
    "causal": causal,
    "lowdim": lowdim,
    "proven": proven,
    "decoding": decoding,
    "decoding-clusters": decoding_clusters,
    "growth": growth,
    "streaming": streaming,
    "real": real,
    "sharp": sharp,
    "diffuse": diffuse,
    "clustering": clustering,
    "distances": distances,
    "gradients": gradients,
    "tensor": tensor,
    "tensor-wide": tensor_wide,
    "tensor-order": tensor_order,
    "reductions": reductions,
    "audit": audit,
    "decisions": decisions,
    "threshold": threshold,
    "imports": imports,
    "linear": linear,
    "softmax-vs-linear": softmax_vs_linear,
    "linear-heads": linear_heads,
    "recall": recall,
    "kernel-features": kernel_features,
    "peers": peers,
    "seeds": seeds,
}
