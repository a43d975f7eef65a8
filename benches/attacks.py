"""How often errors exceed their certificates on heads constructed against sampling."""

from collections import Counter
from dataclasses import replace
from itertools import chain, groupby, pairwise

import numpy as np
from scipy.stats import beta, binom

import fastattn
from benches.heads import Head, real_heads
from benches.made_heads import kinds, made_heads
from benches.progress import steps

TOLS = (1e-1, 3e-2, 1e-2)
# probability that any sound certificate is called unsound, over all kinds together
_ALARM = 0.01
# rows of a real head that are concatenated with those of another
_JOINED = 2048


def attacks(*, quick, data, heads_each):
    """Count errors beyond the certificate and beyond tol, for each kind of head."""
    each, seeds = (1, 1) if quick else (6, 6)
    real = list(real_heads(data, each=1 if quick else heads_each))
    together = joined(real)
    heads = chain(
        made_heads(each),
        (("real heads", head) for head in real),
        (("real heads joined", head) for head in together),
    )
    count = len(kinds()) * each + len(real) + len(together)
    rows = []
    with steps("attacks", count * len(TOLS) * seeds) as step:
        for name, group in groupby(heads, key=lambda pair: pair[0]):
            trials = []
            for _, head in group:
                # a copy: the truth of a head is large
                trials += each_trial(replace(head), seeds, step)
            rows.append(summary(name, trials))
    for row in rows:
        limit = allowed(row["answers"], row["claimed"], _ALARM / len(rows))
        row["holds"] = row["beyond certificate"] <= limit
    rows.append(total(rows))
    last, kept = rows[-1], f"{rows[-1]['holds']} of {len(rows) - 1} kinds hold"
    print(
        f"{last['beyond certificate']} of {last['answers']} beyond their certificate, "
        f"{last['beyond tol']} beyond tol; {kept}"
    )
    return rows


def each_trial(head: Head, seeds: int, step) -> list[dict]:
    """Answer one head at every tolerance with so many seeds."""
    trials = []
    for tol in TOLS:
        for seed in range(seeds):
            answer = fastattn.approximate(
                *head.arrays, scale=head.scale, tol=tol, rng=seed
            )
            trials.append(
                {
                    "error": head.error(answer.value),
                    "certified": float(answer.certificate.error),
                    "failure": float(answer.certificate.failure),
                    "method": type(answer.plan.method).__name__,
                    "tol": tol,
                }
            )
            step()
    return trials


def joined(heads: list[Head]) -> list[Head]:
    """Concatenate the rows of neighbours in the list, where sizes match."""
    found = []
    for left, right in pairwise(heads):
        if left.query.shape[1] != right.query.shape[1]:
            continue
        arrays = [
            np.concatenate([x[:_JOINED], y[:_JOINED]])
            for x, y in zip(left.arrays, right.arrays, strict=True)
        ]
        found.append(Head(f"{left.name} + {right.name}", *arrays, left.scale))
    return found


def summary(name: str, trials: list[dict]) -> dict:
    """Count the answers of one kind."""
    beyond = [x for x in trials if x["error"] > x["certified"]]
    ratio = [x["certified"] / x["error"] for x in trials if x["error"] > 0]
    worst = max(x["error"] / max(x["certified"], 1e-300) for x in trials)
    return {
        "kind": name,
        "answers": len(trials),
        "claimed": max(x["failure"] for x in trials),
        "beyond certificate": len(beyond),
        "beyond tol": sum(x["error"] > x["tol"] for x in trials),
        "worst error over certified": worst,
        "median certified over error": float(np.median(ratio)) if ratio else 1.0,
        "at most, 99 %": upper_rate(len(beyond), len(trials)),
        "methods": _count(trials),
        "methods beyond": _count(beyond),
    }


def allowed(answers: int, failure: float, alarm: float) -> int:
    """Most failures that bounds with probability ``failure`` plausibly show."""
    return int(binom.isf(alarm, answers, failure))


def upper_rate(failures: int, answers: int) -> float:
    """Clopper and Pearson's upper bound of a rate, 99 %."""
    if failures == answers:
        return 1.0
    return float(beta.ppf(0.99, failures + 1, answers - failures))


def _count(trials: list[dict]) -> str:
    counted = Counter(x["method"] for x in trials)
    return ", ".join(f"{name} {count}" for name, count in sorted(counted.items()))


def total(rows: list[dict]) -> dict:
    """Sum the rows up."""
    last = dict.fromkeys(rows[0], "")
    for name in ("answers", "beyond certificate", "beyond tol", "holds"):
        last[name] = sum(row[name] for row in rows)
    worst = "worst error over certified"
    return last | {"kind": "all", worst: max(row[worst] for row in rows)}
