"""Compare two sets of results case by case, with verdicts that account for the spread.

A measured number has a least and a most. If nothing has changed, the ranges of two
runs of m pairs each are disjoint with probability 2 / C(2 m, m): 0.8 % for five pairs,
10 % for three. So a case is better or worse only if the ranges are disjoint, and the
medians differ by more than those of repeated runs on a shared machine. Errors are
gated where they are measured, and not compared here.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benches.measure import Ratio, comparable
from benches.pages import markdown, read, records
from benches.studies import STUDIES

# medians that differ by less are the same, however narrow their ranges
SLACK = 0.1


@dataclass(frozen=True)
class Verdict:
    """The change of one number of one case."""

    study: str
    case: str
    what: str
    before: str
    after: str
    verdict: str


def main(before: Path, after: Path, *, fail: bool) -> int:
    """Print the comparison; status 1 if ``fail`` and something is worse."""
    found = list(compared(loaded(before), loaded(after)))
    if not found:
        print(f"{before} and {after} hold no results")
        return 2
    shown = [vars(x) for x in found if x.verdict != "same within spread"]
    if shown:
        print(markdown(shown) + "\n")
    counts = Counter(x.verdict.partition(":")[0] for x in found)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return 1 if fail and counts["worse"] else 0


def loaded(path: Path) -> dict[str, dict]:
    """Results of a folder or of one file, by study."""
    if path.is_dir():
        return records(path)
    record = read(path)
    return {record["study"]: record}


def compared(before: dict[str, dict], after: dict[str, dict]) -> Iterator[Verdict]:
    """Yield a verdict for every case of every study of both."""
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            side = "before" if name not in before else "after"
            yield Verdict(name, "all", "", "", "", f"missing: {side}")
        elif reason := _obstacle(before[name], after[name]):
            yield Verdict(name, "all", "", "", "", f"not comparable: {reason}")
        else:
            yield from _cases(name, before[name], after[name])


def _obstacle(before: dict, after: dict) -> str:
    """Why times of two results cannot be compared; "" if they can."""
    if before["command"] != after["command"]:
        return f"`{before['command']}`, then `{after['command']}`"
    first, second = (comparable(x["environment"]) for x in (before, after))
    changed = [x for x in {**first, **second} if first.get(x) != second.get(x)]
    return f"other {', '.join(changed)}" if changed else ""


def _cases(name: str, before: dict, after: dict) -> Iterator[Verdict]:
    case = after.get("case", STUDIES[name].case if name in STUDIES else ())
    rows, later = (dict(_numbered(x["rows"], case)) for x in (before, after))
    for key in dict.fromkeys([*rows, *later]):
        label = ", ".join(str(x) for x in key if x != "")
        if key not in rows or key not in later:
            side = "before" if key not in rows else "after"
            yield Verdict(name, label, "", "", "", f"missing: {side}")
            continue
        first, second = (measured(x[key]) for x in (rows, later))
        for what in dict.fromkeys([*first, *second]):
            pair = first.get(what), second.get(what)
            words = verdict(*pair, more_is_better=what.startswith("times faster"))
            yield Verdict(name, label, what, *map(str, pair), words)
        if not first and not second:
            same = rows[key] == later[key]
            yield Verdict(name, label, "", "", "", "same row" if same else "other row")


def _numbered(rows: list[dict], case) -> Iterator[tuple[tuple, dict]]:
    """Yield rows by their case; those of one case by their order, too."""
    seen: Counter[tuple] = Counter()
    for row in rows:
        key = tuple(str(row.get(column)) for column in case)
        seen[key] += 1
        yield (*key, f"no. {seen[key]}" if seen[key] > 1 else ""), row


def measured(row: dict) -> dict[str, Ratio]:
    """Numbers of a row that have a least and a most in the two columns after them."""
    found, columns = {}, list(row)
    for name, low, high in zip(columns, columns[1:], columns[2:], strict=False):
        if (low, high) in (("least", "most"), (f"{name}, least", f"{name}, most")):
            values = row[name], row[low], row[high]
            if all(isinstance(x, int | float) and math.isfinite(x) for x in values):
                found[name] = Ratio(*values)
    return found


def verdict(before: Ratio | None, after: Ratio | None, *, more_is_better: bool) -> str:
    """Compare one number by both ranges."""
    if before is None or after is None:
        return f"missing: {'before' if before is None else 'after'}"
    if not more_is_better:
        before, after = before.inverse, after.inverse
    if max(x.high / x.low for x in (before, after)) == 1:
        return "one measurement each: no verdict"
    if after.low > before.high and after.median > (1 + SLACK) * before.median:
        return "better"
    if after.high < before.low and before.median > (1 + SLACK) * after.median:
        return "worse"
    return "same within spread"
