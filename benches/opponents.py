"""Attention of other packages, and of the field's definitions, as timed calls.

Packages of the Python package index run as published. Of layers only the attention is
used: their projections are replaced by the identity.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from benches.measure import missing, torch_or_none

torch = torch_or_none()


@dataclass(frozen=True)
class Opponent:
    """A method at one size: ``prepare(query, key, value)`` gives the call to time.

    The arrays are float32 tensors of shape (1, 1, n, d), and the scale is d ** -0.5.
    """

    family: str
    setting: str
    prepare: Callable
    package: str = "definition"

    @property
    def name(self) -> str:
        """Family and setting."""
        return f"{self.family} {self.setting}".strip()


def sdpa(query, key, value):
    return partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)


def half_sdpa(query, key, value):
    return sdpa(*(x.to(torch.bfloat16) for x in (query, key, value)))


def mean_value(query, key, value):
    return lambda: value.mean(dim=-2, keepdim=True).expand_as(value)


def sampled_keys(query, key, value, *, size):
    generator = torch.Generator().manual_seed(0)

    def call():
        rows = torch.randperm(key.shape[-2], generator=generator)[:size]
        return sdpa(query, key[..., rows, :], value[..., rows, :])()

    return call


def elu_plus_one(query, key, value):
    """Linear attention with the feature map elu(x) + 1 (arXiv 2006.16236)."""

    def features(x):
        return torch.nn.functional.elu(x) + 1

    def call():
        q, k = features(query), features(key)
        total = q @ k.sum(dim=-2)[..., None]
        return q @ (k.transpose(-1, -2) @ value) / total

    return call


def performer(query, key, value, **options):
    from performer_pytorch import FastAttention

    torch.manual_seed(0)
    return partial(FastAttention(query.shape[-1], **options), query, key, value)


def darkformer(query, key, value, *, size):
    """Draw the features for these very inputs, outside the timed call."""
    from darkformer_pytorch import DarkformerKernelAttention

    layer = DarkformerKernelAttention(
        query.shape[-1], 1, num_features=size, projection_seed=0
    )
    layer.eval().random_features.initialize_variance_optimal_proposal_(query, key)
    return partial(layer, query, key, value)


def nystromformer(query, key, value, *, size):
    from nystrom_attention import NystromAttention

    n, d = query.shape[-2:]
    layer = NystromAttention(d, d, 1, num_landmarks=size, residual=False).eval()
    layer.to_qkv = layer.to_out = torch.nn.Identity()
    joint = torch.cat((query, key, value), dim=-1)[0]
    # without a mask the padding rows would take part
    mask = torch.ones((1, n), dtype=torch.bool) if n % size else None
    return partial(layer, joint, mask=mask)


def taylor(query, key, value, **options):
    from taylor_series_linear_attention import TaylorSeriesLinearAttn

    d = query.shape[-1]
    layer = TaylorSeriesLinearAttn(
        d, dim_head=d, heads=1, combine_heads=False, **options
    )
    layer.to_q[0] = layer.to_kv[0] = torch.nn.Identity()
    return partial(layer.eval(), query[0], context=torch.cat((key, value), -1)[0])


def kernel_features(query, key, value, *, sampler, size):
    """Run scikit-learn's features of the Gaussian kernel, weighted by the norms."""
    from sklearn import kernel_approximation

    query, key, value = (x[0, 0].numpy() for x in (query, key, value))
    gamma = query.shape[1] ** -0.5 / 2
    make = getattr(kernel_approximation, sampler)

    def call():
        keys = key - key.mean(axis=0)
        features = make(gamma=gamma, n_components=size, random_state=0).fit(keys)
        logs = gamma * np.sum(keys**2, axis=1)
        weights = np.exp(logs - logs.max())[:, None]
        sums = features.transform(keys).T @ np.hstack((weights * value, weights))
        mixed = features.transform(query) @ sums
        return mixed[:, :-1] / mixed[:, -1:]

    return call


def nystrom_on_keys(query, key, value, *, size, temperature, block=32, ridge=1e-5):
    """Interpolate ``exp(s q . k)`` in ``k`` at randomly pivoted keys.

    The interpolation is that of the kernel ``exp(s k . k' / t)``, computed as a
    Gaussian one; ``t`` is ``temperature`` where queries and keys are as long as each
    other. Pivots come from ``2 * size`` keys by block randomly pivoted Cholesky
    (arXiv 2207.06503).
    """
    query, key, value = query[0, 0], key[0, 0], value[0, 0]
    scale = query.shape[1] ** -0.5
    generator = torch.Generator().manual_seed(0)

    def call():
        keys = key - key.mean(dim=0)
        t = float(temperature * keys.norm() / query.norm())
        keys *= (scale / t) ** 0.5
        few = keys[torch.randperm(len(keys), generator=generator)[: 2 * size]]
        chosen = few[_pivots(few, min(size, len(few)), block, generator)]
        half = (chosen**2).sum(dim=1, keepdim=True) / 2
        peak = (keys**2).sum(dim=1).max() / 2
        sums = torch.zeros((len(chosen), value.shape[1] + 1))
        for k, v in zip(keys.split(2048), value.split(2048), strict=True):
            weights = torch.exp(chosen @ k.T - half - peak)
            sums += weights @ torch.cat((v, torch.ones((len(v), 1))), dim=1)
        gram = _gaussian(chosen, chosen).double() + ridge * torch.eye(len(chosen))
        mixed = torch.cholesky_solve(sums.double(), torch.linalg.cholesky(gram)).float()
        answers = []
        points = chosen * (scale * t) ** 0.5
        for q in query.split(2048):
            logits = q @ points.T - half.T
            logits -= logits.amax(dim=1, keepdim=True)
            found = torch.exp(logits) @ mixed
            answers.append(found[:, :-1] / found[:, -1:])
        return torch.cat(answers)

    return call


def _gaussian(x, y):
    half = [(z**2).sum(dim=1) / 2 for z in (x, y)]
    return torch.exp(x @ y.T - half[0][:, None] - half[1])


def _pivots(points, size, block, generator):
    """Choose rows by block randomly pivoted Cholesky of their Gaussian kernel."""
    factor = torch.zeros((size, len(points)))
    residual, free = torch.ones(len(points)), torch.ones(len(points))
    chosen = torch.zeros(0, dtype=torch.long)
    while len(chosen) < size:
        done, count = len(chosen), min(block, size - len(chosen))
        chance = residual.clamp(min=1e-9) * free
        fresh = torch.multinomial(chance, count, generator=generator)
        rows = _gaussian(points[fresh], points)
        rows -= factor[:done, fresh].T @ factor[:done]
        own = rows[:, fresh] + 1e-5 * torch.eye(count)
        factor[done : done + count] = torch.linalg.solve_triangular(
            torch.linalg.cholesky(own), rows, upper=False
        )
        residual -= (factor[done : done + count] ** 2).sum(dim=0)
        free[fresh] = 0
        chosen = torch.cat((chosen, fresh))
    return chosen


def opponents(*, quick: bool) -> Iterator[Opponent]:
    """Yield the methods at their sizes, those whose package is installed."""
    return (x for x in _table(quick) if not _is_absent(x))


def absent(*, quick: bool) -> list[str]:
    """Families whose package is not installed."""
    return list(dict.fromkeys(x.family for x in _table(quick) if _is_absent(x)))


def _table(quick: bool) -> Iterator[Opponent]:
    yield Opponent("SDPA in bfloat16", "", half_sdpa, "torch")
    yield Opponent("mean of the values", "", mean_value)
    yield Opponent("elu+1 linear attention", "", elu_plus_one)
    for flag in (False, True):
        yield Opponent(
            "taylor-series-linear-attention",
            "minimal basis" if flag else "",
            partial(taylor, remove_even_power_dups=flag),
            "taylor_series_linear_attention",
        )
    yield Opponent(
        "efficient attention",
        "",
        partial(performer, no_projection=True),
        "performer_pytorch",
    )
    for size in (256,) if quick else (64, 256, 1024):
        count = f"m={size}"
        yield Opponent("sampled keys", count, partial(sampled_keys, size=size))
        yield Opponent(
            "performer-pytorch",
            count,
            partial(performer, nb_features=size),
            "performer_pytorch",
        )
        yield Opponent(
            "darkformer-pytorch",
            count,
            partial(darkformer, size=size),
            "darkformer_pytorch",
        )
        for sampler in ("Nystroem", "RBFSampler"):
            call = partial(kernel_features, sampler=sampler, size=size)
            yield Opponent(f"sklearn {sampler}", count, call, "sklearn")
    for size in (64,) if quick else (64, 128, 256):
        call = partial(nystromformer, size=size)
        yield Opponent("nystrom-attention", f"m={size}", call, "nystrom_attention")
    for size in (256,) if quick else (64, 128, 256, 512, 1024):
        for temperature in (2,) if quick else (1, 2, 4):
            yield Opponent(
                "Nystrom on keys",
                f"m={size}, temperature {temperature}",
                partial(nystrom_on_keys, size=size, temperature=temperature),
            )


def _is_absent(opponent: Opponent) -> bool:
    return opponent.package != "definition" and bool(missing((opponent.package,)))
