"""The numbers of planning: each explained, each read when it is needed."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from benches.studies import STUDIES
from fastattn import approximate
from fastattn.costs import policy
from fastattn.costs.policy import POLICY

FILES = sorted(Path(policy.__file__).parent.glob("*polic*.py"))
# a comment above a field, or beside it
FIELD = re.compile(
    r"^(?:    # (?P<above>.+)\n)?"
    r"    \w+: .*(?:int|float|\]) = [^#\n]*(?:# (?P<beside>.+))?$",
    re.MULTILINE,
)


def test_every_number_says_what_it_trades():
    fields = [x for path in FILES for x in FIELD.finditer(path.read_text("utf-8"))]
    rooms = [x for x in vars(POLICY).values() if dataclasses.is_dataclass(x)]
    assert len(fields) == sum(len(vars(x)) for x in [POLICY, *rooms]) - len(rooms)
    remarks = [x["above"] or x["beside"] or "" for x in fields]
    assert all(len(x) > 8 for x in remarks)
    studies = [x for remark in remarks for x in re.findall(r"\[(.+)\]", remark)]
    assert set(studies) - {"derived"} <= set(STUDIES)
    assert len(studies) > 50


def test_numbers_are_read_when_they_are_needed(monkeypatch):
    x = np.random.default_rng(0).standard_normal((3, 100, 8)) / 4
    assert "too few" in approximate(*x, tol=0.1, rng=0).plan.reason
    monkeypatch.setitem(vars(POLICY.auto), "few_logits", 0)
    monkeypatch.setitem(vars(POLICY.auto), "fewest_logits", 0)
    assert "too few" not in approximate(*x, tol=0.1, rng=0).plan.reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        POLICY.auto.few_logits = 1
