"""The heads of a file, one after the other, for the commands."""

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

import fastattn
from fastattn.files import formats
from fastattn.files.mapped import native, native_dtype
from fastattn.problem.batch import name_of
from fastattn.streaming.rows import FileHead, mapped_anew
from sketching._lib.arrays import Array, compute_dtype

METHODS = {
    "auto": fastattn.Auto,
    "exact": fastattn.Exact,
    "polynomial": fastattn.Polynomial,
    "multipole": fastattn.Multipole,
}
# a head larger than 1 / _SHARE of the memory is streamed: methods copy it again to
# sort, convert or shift it
_SHARE = 4
# bytes of the certificate and plan of a head, in the report and in the file
_HEAD_BYTES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class FileHeads:
    """The inputs of a file with the options of a command."""

    arrays: tuple[Array, Array, Array]
    meta: dict[str, Any]
    lead: tuple[int, ...]
    options: Any

    @staticmethod
    def of(options: Any) -> "FileHeads":
        """Map the arrays of the input of a command; check them, or raise."""
        *arrays, meta = formats.read_stored(options.input, options.memory)
        shapes = [x.shape for x in arrays]
        for name, shape in zip(("query", "key", "value"), shapes, strict=True):
            if 0 in shape[:-2]:
                raise ValueError(f"{options.input}: there are no heads: {shapes}")
            if 0 in shape:
                raise ValueError(
                    f"{options.input}: {name}: expected a non-empty array, got shape "
                    f"{shape}"
                )
        try:
            lead = np.broadcast_shapes(*(shape[:-2] for shape in shapes))
        except ValueError as error:
            raise ValueError(
                f"{options.input}: leading dimensions of query, key and value do not "
                f"broadcast: {shapes}"
            ) from error
        if math.prod(lead) * _HEAD_BYTES > options.memory:
            raise ValueError(
                f"{options.input}: {math.prod(lead)} heads, whose certificates alone "
                f"take more than {options.memory} bytes of memory: allow "
                f"more by --memory, or split the file: {shapes}"
            )
        return FileHeads((arrays[0], arrays[1], arrays[2]), meta, lead, options)

    def each(
        self, function: Callable[..., Any], streamed: Callable[..., Any]
    ) -> Iterator[tuple[list[int], Any]]:
        """Call ``function`` for one head after the other, each copied into memory.

        ``streamed`` is called with a ``FileHead`` instead for heads that are too large,
        and with a function that advances a progress bar.
        """
        options = self.options
        # each call spawns its stream from this one, as a single call for all heads does
        rng = np.random.default_rng(options.seed)
        wanted = {
            "tol": options.tol,
            "method": METHODS[options.method](),
            "guarantee": options.guarantee,
        }
        with progress("heads", math.prod(self.lead)) as step:
            for place in np.ndindex(*self.lead):
                try:
                    if self.is_large:
                        (stream,) = rng.spawn(1)
                        file = self._file_head(place)
                        result = streamed(file, rng=stream, step=step, **wanted)
                    else:
                        result = function(
                            *self._copied(place),
                            scale=options.scale,
                            is_causal=options.causal,
                            rng=rng,
                            **wanted,
                        )
                        step(1.0)
                except (ValueError, TypeError) as error:
                    where = f"head {name_of(place)}: " if place else ""
                    raise ValueError(f"{options.input}: {where}{error}") from error
                yield list(place), result

    @property
    def is_large(self) -> bool:
        """Whether a head takes too large a share of memory to be copied into it."""
        if any(x.ndim < 2 for x in self.arrays):
            return False
        entries = sum(math.prod(x.shape[-2:]) for x in self.arrays)
        # half precision is computed in float32
        size = entries * max(4, self.arrays[0].dtype.itemsize)
        return bool(size > self.options.memory // _SHARE)

    def _copied(self, place: tuple[int, ...]) -> Iterator[Array]:
        """Copy one head into memory."""
        for x in self.arrays:
            # a new map for each head: pages of one map for all would stay in memory
            heads = np.broadcast_to(mapped_anew(x), self.lead + x.shape[-2:])
            yield native(np.array(heads[place]))

    def _file_head(self, place: tuple[int, ...]) -> FileHead:
        """One head in the file, not copied."""
        options = self.options
        if options.causal:
            raise ValueError(
                "causal attention needs the keys of a head in memory, which exceed "
                f"the limit of {options.memory} bytes: allow more by --memory"
            )
        return FileHead.of(self.arrays, place, options.scale, options.memory)

    def check_room(self) -> None:
        """Raise ``OSError`` where the answers do not fit on the disk of the output."""
        if any(x.ndim < 2 for x in self.arrays):
            # the error for this head says so
            return
        n, p = self.arrays[0].shape[-2], self.arrays[2].shape[-1]
        size = math.prod(self.lead) * n * (p + 1)
        size *= native_dtype(self.arrays[0]).itemsize
        folder = Path(self.options.output).parent
        # answers are collected in temporary files next to the output, then written
        if 2 * size > (free := shutil.disk_usage(folder).free):
            raise OSError(
                f"{self.options.output}: answers take {2 * size} bytes while they are "
                f"written, {free} are free"
            )

    def describe(self) -> dict[str, Any]:
        """The options of the command, for the report."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Outputs of all heads in temporary files: they may be larger than memory.

    Parameters
    ----------
    files : pair of files
        For the outputs, and for their log-sum-exps.
    problem : FileHeads
        The inputs.
    """

    files: tuple[IO[bytes], IO[bytes]]
    problem: FileHeads

    @staticmethod
    @contextmanager
    def in_folder_of(output: str, problem: FileHeads) -> Iterator["Answers"]:
        """Open the files in the folder of the output."""
        with ExitStack() as stack:
            one, two = (
                stack.enter_context(tempfile.TemporaryFile(dir=Path(output).parent))
                for _ in range(2)
            )
            yield Answers((one, two), problem)

    @property
    def _kinds(self) -> tuple[tuple[Any, tuple[int, ...]], ...]:
        """Dtype and shape of both arrays, of one head."""
        query, _, value = self.problem.arrays
        dtype, n = native_dtype(query), query.shape[-2]
        return (dtype, (n, value.shape[-1])), (compute_dtype(np, dtype), (n,))

    def put(self, number: int, start: int, *arrays: Array) -> None:
        """Write outputs and log-sum-exps of a head, from row ``start``."""
        for file, (dtype, shape), x in zip(
            self.files, self._kinds, arrays, strict=True
        ):
            width = math.prod(shape[1:])
            place = (number * shape[0] + start) * width * np.dtype(dtype).itemsize
            file.seek(place)
            np.ascontiguousarray(x, dtype).tofile(file)

    def gather(self) -> dict[str, Array]:
        """Map the outputs and log-sum-exps of all heads."""
        found = {}
        for name, file, (dtype, shape) in zip(
            ("out", "log_normalizer"), self.files, self._kinds, strict=True
        ):
            file.flush()
            found[name] = np.memmap(file, dtype, "r", shape=self.problem.lead + shape)
        return found


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances a progress bar by a step, or a part of one."""
    bar = None
    if sys.stderr.isatty():
        with suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
    if bar is None:
        yield lambda _: None
        return
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda share: bar.advance(task, share)
