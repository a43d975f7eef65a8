"""The registry: every study with its family, the columns of a case, and its needs."""

from collections.abc import Callable
from dataclasses import dataclass

from benches.attacks import attacks
from benches.attention import bounded, exact, proven, real
from benches.causal import causal
from benches.clustering import clustering
from benches.damaged_files import damaged
from benches.decoding import decoding, decoding_clusters
from benches.distances import distances
from benches.gradients import gradients
from benches.growth import growth
from benches.hardness import audit, decisions, reductions
from benches.imports import imports
from benches.kernel_features import kernel_features
from benches.linear import linear
from benches.linear_heads import linear_heads
from benches.lowdim import lowdim
from benches.maps import speed_map
from benches.peers import peers
from benches.planning import alone, clustered_growth, nothing_fits
from benches.proven_fuzz import proven_fuzz
from benches.real_heads import diffuse, sharp
from benches.seeds import seeds
from benches.single_location import single_location
from benches.sketches import attack, sketch_error
from benches.softmax_vs_linear import recall, softmax_vs_linear
from benches.streaming import streaming
from benches.tensor import tensor, tensor_order, tensor_sampled, tensor_wide
from benches.threshold import threshold

_TORCH = ("torch",)


@dataclass(frozen=True)
class Study:
    """One table: rows of correct answers, each with the time that it took.

    ``case`` are the columns that identify its rows, in any run. ``needs`` are the
    packages without which nothing of it can be measured; missing opponents
    within a study are named in its rows.
    """

    name: str
    family: str
    run: Callable
    case: tuple[str, ...]
    needs: tuple[str, ...] = ()


_HEAD = ("head", "n", "tol")
_FILE = ("file", "n", "heads", "tol")
_WHAT = ("what", "n", "d", "opponent")

# in the order of a whole run, and of the page
STUDIES = {
    study.name: study
    for study in (
        Study("exact", "exact attention", exact, ("n", "d"), _TORCH),
        Study(
            "gradients", "exact attention", gradients, ("method", "n", "over"), _TORCH
        ),
        Study("bounded", "polynomials", bounded, ("n",), _TORCH),
        Study("causal", "polynomials", causal, _HEAD, _TORCH),
        Study("lowdim", "polynomials", lowdim, ("n", "noise", "tol"), _TORCH),
        Study("proven", "polynomials", proven, ("input", "n"), _TORCH),
        Study("proven-fuzz", "all methods", proven_fuzz, ("kind", "dtype")),
        Study("decoding", "polynomials", decoding, ("tokens", "tol")),
        Study("streaming", "polynomials", streaming, ("keys", "by")),
        Study("sharp", "landmarks and clusters", sharp, _FILE, _TORCH),
        Study("diffuse", "landmarks and clusters", diffuse, _FILE, _TORCH),
        Study("alone", "landmarks and clusters", alone, _HEAD, _TORCH),
        Study("nothing-fits", "landmarks and clusters", nothing_fits, ("n", "d")),
        Study(
            "clustered-growth",
            "landmarks and clusters",
            clustered_growth,
            ("head", "method"),
        ),
        Study(
            "decoding-clusters",
            "landmarks and clusters",
            decoding_clusters,
            ("head", "keys", "tol"),
        ),
        Study("peers", "all methods", peers, ("head", "n", "method"), _TORCH),
        Study("growth", "all methods", growth, ("method", "n")),
        Study("map", "all methods", speed_map, ("n", "entries", "method"), _TORCH),
        Study("real", "all methods", real, _HEAD, _TORCH),
        Study("seeds", "all methods", seeds, _HEAD),
        Study("attacks", "all methods", attacks, ("kind",)),
        Study("tensor", "tensor attention", tensor, ("method", "n")),
        Study("tensor-sampled", "tensor attention", tensor_sampled, ("n", "tol")),
        Study("tensor-wide", "tensor attention", tensor_wide, ("d", "n")),
        Study("tensor-order", "tensor attention", tensor_order, ("d", "degree")),
        Study("linear", "linear attention", linear, ("feature map", "n"), _TORCH),
        Study(
            "softmax-vs-linear", "linear attention", softmax_vs_linear, ("sweep", "at")
        ),
        Study("single-location", "linear attention", single_location, ("sweep", "at")),
        Study("linear-heads", "linear attention", linear_heads, ("head", "n")),
        Study("recall", "linear attention", recall, ("method", "pairs")),
        Study(
            "kernel-features",
            "linear attention",
            kernel_features,
            ("features", "number"),
        ),
        Study("distances", "Mahalanobis", distances, _WHAT),
        Study("clustering", "Mahalanobis", clustering, _WHAT),
        Study("sketch-error", "Mahalanobis", sketch_error, ("sketches", "rows")),
        Study("attack", "Mahalanobis", attack, ("mode", "steps")),
        Study(
            "reductions",
            "thresholds",
            reductions,
            ("problem", "order", "n", "construction"),
        ),
        Study("audit", "thresholds", audit, ("family", "method")),
        Study("decisions", "thresholds", decisions, ("order", "family", "n", "method")),
        Study(
            "threshold",
            "thresholds",
            threshold,
            ("order", "family", "error", "measure"),
        ),
        Study("imports", "library", imports, ()),
        Study("damaged-files", "library", damaged, ("kind",)),
    )
}
FAMILIES = tuple(dict.fromkeys(study.family for study in STUDIES.values()))
