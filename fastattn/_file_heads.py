"""The heads of a file, one after the other, for the commands."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

import fastattn
from fastattn import formats
from sketching._lib.arrays import Array

METHODS = {
    "auto": fastattn.Auto,
    "exact": fastattn.Exact,
    "polynomial": fastattn.Polynomial,
    "multipole": fastattn.Multipole,
}


@dataclass(frozen=True, slots=True, eq=False)
class FileHeads:
    """The inputs of a file with the options of a command."""

    arrays: tuple[Array, Array, Array]
    meta: dict[str, Any]
    lead: tuple[int, ...]
    options: Any

    @staticmethod
    def of(options: Any) -> "FileHeads":
        *arrays, meta = formats.read_inputs(options.input)
        shapes = [x.shape for x in arrays]
        try:
            lead = np.broadcast_shapes(*(shape[:-2] for shape in shapes))
        except ValueError as error:
            raise ValueError(
                f"{options.input}: leading dimensions of query, key and value do not "
                f"broadcast: {shapes}"
            ) from error
        if 0 in lead:
            raise ValueError(f"{options.input}: there are no heads: {shapes}")
        return FileHeads((arrays[0], arrays[1], arrays[2]), meta, lead, options)

    def each(self, function: Callable[..., Any]) -> Iterator[tuple[list[int], Any]]:
        """Call ``function`` for one head after the other, each copied into memory."""
        options = self.options
        arrays = [np.broadcast_to(x, self.lead + x.shape[-2:]) for x in self.arrays]
        # every call spawns its stream from this one, as one call for all heads would
        rng = np.random.default_rng(options.seed)
        with progress("heads", math.prod(self.lead)) as step:
            for place in np.ndindex(*self.lead):
                try:
                    result = function(
                        *(np.array(x[place]) for x in arrays),
                        tol=options.tol,
                        scale=options.scale,
                        is_causal=options.causal,
                        method=METHODS[options.method](),
                        guarantee=options.guarantee,
                        rng=rng,
                    )
                except (ValueError, TypeError) as error:
                    where = f"head {name_of(place)}: " if place else ""
                    raise ValueError(f"{options.input}: {where}{error}") from error
                yield list(place), result
                step()

    def gather(self, file: IO[bytes], last: Array) -> Array:
        """Map what the heads left in a scratch file, given the last of them."""
        file.flush()
        return np.memmap(file, last.dtype, "r", shape=self.lead + last.shape)

    def describe(self) -> dict[str, Any]:
        """Say what was asked for, for the record."""
        options = self.options
        return {
            "fastattn": fastattn.__version__,
            "input": options.input,
            "input_meta": self.meta,
            "tol": options.tol,
            "scale": options.scale,
            "is_causal": options.causal,
            "guarantee": options.guarantee,
            "method": options.method,
            "seed": options.seed,
        }


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; it moves a bar on a terminal."""
    bar = None
    if sys.stderr.isatty():
        with suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
    if bar is None:
        yield lambda: None
        return
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def name_of(place: Sequence[int]) -> str:
    """Write the place of a head."""
    return ",".join(str(i) for i in place) or "-"
