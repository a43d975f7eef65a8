"""The mutable part of an index: a reference to its current state.

A reader takes a state and works on it without a lock. Changes exclude each other; each
computes another state first and publishes it by one assignment. Rows that are replaced
or removed are written in place if nobody reads, and otherwise in a copy: the values are
computed beforehand and stored with the new state, so that the next caller repeats
writes that an interrupt has cut off.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.cell import Cell, under
from sketching._lib.spare import Spare
from sketching.index.answers import Answers
from sketching.index.columns import Write, make
from sketching.index.points import Points
from sketching.index.request import Request
from sketching.index.state import Mode, State
from sketching.metric.mahalanobis import MahalanobisMetric

_T = TypeVar("_T")
_Change = Callable[[State], tuple[State, list[Write]]]


class IndexEngine:
    """A state behind a lock, and its readers."""

    def __init__(
        self,
        metric: MahalanobisMetric,
        mode: Mode | None,
        promise: tuple[float, float],
        generator: np.random.Generator,
    ) -> None:
        self._begin(State.empty(metric, mode, promise, generator))

    def _begin(self, state: State) -> None:
        self._lock = threading.RLock()
        # the state, and writes that may not all have been made
        self._now: tuple[State, list[Write]] = state, []
        self._readers: list[weakref.ref[Answers]] = []
        self._spare = Spare()

    def __getstate__(self) -> State:
        return under(self._lock, self._settled)

    def __setstate__(self, state: State) -> None:
        self._begin(state)

    def _settled(self) -> State:
        """Return the state, with every write made; with the lock only."""
        state, writes = self._now
        if writes:
            make(writes)
            self._now = state, []
        return state

    def _is_read(self) -> bool:
        """Whether somebody reads this state or an earlier one."""
        self._readers = [x for x in self._readers if x() is not None]
        return bool(self._readers)

    def answers(self, *, fresh: bool = True) -> Answers:
        """Take a state to read; a fresh one has no pending updates."""

        def take() -> Answers:
            state = self._settled()
            if fresh:
                state = state.flushed()
                self._now = state, []
            self._readers = [x for x in self._readers if x() is not None]
            for reader in self._readers:
                found = reader()
                if found is not None and found.state is state:
                    return found
            answers = Answers(state)
            self._readers.append(weakref.ref(answers))
            return answers

        return under(self._lock, take)

    def _put(self, change: Callable[[State], State]) -> State:
        """Publish another state."""

        def put() -> State:
            state = change(self._settled())
            self._now = state, []
            return state

        return under(self._lock, put)

    def _rewrite(self, change: _Change) -> None:
        """Publish another state whose rows are written over those of this one."""

        def rewrite() -> None:
            state = self._settled()
            self._now = change(state.private() if self._is_read() else state)
            self._settled()

        under(self._lock, rewrite)

    def insert(self, x: Array) -> Array:
        """Insert points; return their numbers."""
        state = self._put(lambda state: state.inserted(x))
        numbers: Array = state.filled.given - len(x) + np.arange(len(x))
        return numbers

    def remove(self, numbers: Any) -> None:
        """Remove points."""

        def change(state: State) -> tuple[State, list[Write]]:
            return state.removed(_distinct(state, numbers))

        self._rewrite(change)

    def move(self, numbers: Any, x: Array) -> None:
        """Move points."""

        def change(state: State) -> tuple[State, list[Write]]:
            slots = _distinct(state, numbers)
            if len(x) != len(slots):
                raise ValueError(f"X: expected {len(slots)} rows, got {len(x)}")
            return state.moved(slots, x)

        self._rewrite(change)
        self._put(lambda state: state.well_centred())

    def update(self, left: Array, right: Array) -> None:
        """Change the metric; the points follow when an answer needs it."""

        def change(state: State) -> State:
            before = state.metric._factor
            state = state.updated(left, right, self._spare.take())
            self._spare.keep(before)
            return state

        self._put(change)

    def flush(self) -> None:
        """Bring norms and sketches to the metric of now."""
        self._put(lambda state: state.flushed())

    def redraw(self, generator: np.random.Generator) -> None:
        """Centre anew and draw new sketches."""
        self._put(lambda state: state.redrawn(generator))

    def snapshot(self) -> "IndexEngine":
        """Return an engine in the state of now, which stays as it is."""
        engine = object.__new__(IndexEngine)
        answers = self.answers()
        engine._begin(answers.state)
        engine._readers.append(weakref.ref(answers))
        engine._held = answers
        return engine

    _held: Answers | None = None

    @property
    def state(self) -> State:
        """The current state, with its pending updates."""
        return self._now[0]

    @property
    def metric(self) -> MahalanobisMetric:
        """The metric; it is never changed in place."""
        return self.state.metric

    @property
    def points(self) -> Points | None:
        """The points, to which updates of the metric may be pending."""
        return self.answers(fresh=False).state.points

    @points.setter
    def points(self, points: Points) -> None:
        self._put(lambda state: replace(state, points=points))

    @property
    def filled(self) -> Points:
        """The points; an error where there are none."""
        return self.answers(fresh=False).state.filled

    @property
    def sketch(self) -> Any:
        """The sketch, to which updates of the metric may be pending."""
        return self.answers(fresh=False).state.sketch

    @sketch.setter
    def sketch(self, sketch: Any) -> None:
        self._put(lambda state: replace(state, sketch=sketch))

    @property
    def running(self) -> Mode:
        """The mode, which the first insertion has picked."""
        return self.state.running

    @property
    def eps(self) -> float:
        """Relative error of estimated distances."""
        return self.state.promise[0]

    @property
    def delta(self) -> float:
        """Probability that an answer breaks the promise."""
        return self.state.promise[1]

    @property
    def draws(self) -> np.random.Generator:
        """The random stream of the sketches."""
        return self.state.draws

    @property
    def samples(self) -> np.random.Generator:
        """The random stream of the queries' samples."""
        return self.state.samples

    @property
    def answered(self) -> int:
        """How many queries were answered since sketches were drawn."""
        return self.state.answered.value

    @answered.setter
    def answered(self, count: int) -> None:
        self._put(lambda state: replace(state, answered=Cell(count)))

    @property
    def picks(self) -> bool:
        """Whether the index picks the mode itself."""
        return self.state.picks

    @picks.setter
    def picks(self, picks: bool) -> None:
        self._put(lambda state: replace(state, picks=bool(picks)))

    @property
    def drawn_from(self) -> int:
        """How many points the mode and the directions of a head were drawn from."""
        return self.state.drawn_from

    @drawn_from.setter
    def drawn_from(self, count: int) -> None:
        self._put(lambda state: replace(state, drawn_from=count))

    @property
    def given(self) -> int:
        """How many numbers points were given so far."""
        points = self.state.points
        return 0 if points is None else points.given

    def request(self) -> Request:
        """The arguments of a mode."""
        return self.answers(fresh=False).state.request()


def _distinct(state: State, numbers: Any) -> Array:
    """Find points by distinct numbers."""
    return state.filled.slots("numbers", numbers, distinct=True)
