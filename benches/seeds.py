"""How often the error meets the tolerance, over heads, tolerances and seeds."""

from collections import Counter
from pathlib import Path

import numpy as np

import fastattn
import sketching
from benches.heads import real_heads
from benches.progress import steps
from benches.resume import fingerprint, recall, record

TOLS = (2e-1, 1e-1, 5e-2, 2e-2, 1e-2)


def seeds(*, quick, data, heads_each, results):
    """Count realised error <= tol over (head, tol, seed), and list the misses.

    Results are stored line by line in ``seeds.part.jsonl`` until the study is
    complete; a run that was stopped continues from there, if the code is the same.
    """
    part = Path(results) / f"seeds{'-quick' if quick else ''}.part.jsonl"
    code = fingerprint(fastattn, sketching)
    done = recall(part, code)
    count, rows = 2 if quick else 20, []
    heads = list(real_heads(data, each=heads_each))
    total_steps = len(heads) * len(TOLS) * count
    with steps("seeds", total_steps) as step, part.open("a") as file:
        for number, head in enumerate(heads):
            for tol in TOLS:
                trials = []
                for seed in range(count):
                    key = (head.name, len(head), tol, seed)
                    if key not in done:
                        done[key] = trial(head, tol, seed)
                        record(file, code, key, done[key])
                    trials.append(done[key])
                    step()
                rows.append(summary(head.name, len(head), tol, trials))
            # the truth of a long head is large
            heads[number] = None
    part.unlink()
    rows.append(total(rows))
    print(f"{rows[-1]['within']} of {rows[-1]['seeds']} within their tolerance")
    return rows


def trial(head, tol: float, seed: int) -> dict:
    """Run one seed."""
    answer = fastattn.approximate(*head.arrays, scale=head.scale, tol=tol, rng=seed)
    return {
        "seed": seed,
        "realised": head.error(answer.value),
        "certified": float(answer.certificate.error),
        "method": type(answer.plan.method).__name__,
    }


def summary(name: str, n: int, tol: float, trials: list[dict]) -> dict:
    """Count the seeds of one head at one tolerance."""
    realised = [x["realised"] for x in trials]
    methods = Counter(x["method"] for x in trials)
    misses = [x for x in trials if not x["realised"] <= tol]
    return {
        "head": name,
        "n": n,
        "tol": tol,
        "seeds": len(trials),
        "within": len(trials) - len(misses),
        "certificate holds": sum(x["realised"] <= x["certified"] for x in trials),
        "median over tol": float(np.median(realised)) / tol,
        "worst over tol": max(realised) / tol,
        "methods": ", ".join(f"{m} {c}" for m, c in sorted(methods.items())),
        "misses": "; ".join(
            f"seed {x['seed']}: {x['realised']:.3e} of {x['method']}, certified "
            f"{x['certified']:.3e}"
            for x in misses
        ),
    }


def total(rows: list[dict]) -> dict:
    """Sum the rows up: counts, and the worst."""
    counted = ("seeds", "within", "certificate holds")
    last = dict.fromkeys(rows[0], "")
    last |= {name: sum(row[name] for row in rows) for name in counted}
    worst = max(row["worst over tol"] for row in rows)
    return last | {"head": "all", "worst over tol": worst}
