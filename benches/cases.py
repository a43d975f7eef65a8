"""Inputs by name, each with the options that a call takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

import fastattn


@dataclass(frozen=True)
class Case:
    """One kind of input: ``inputs(n, rng)`` gives query, key and value of one head."""

    name: str
    inputs: Callable
    scale: float
    tol: float
    options: dict = field(default_factory=dict)


def gaussian(n, rng, *, d=64):
    """Independent Gaussian query, key and value."""
    return tuple(rng.standard_normal((n, d)).astype(np.float32) for _ in range(3))


def unit_rows(n, rng, *, d=8):
    """Query and key on the unit sphere: with scale 1 no logit exceeds 1."""
    query, key, value = (rng.standard_normal((n, d)) for _ in range(3))
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    return tuple(x.astype(np.float32) for x in (query, key, np.clip(value, -1, 1)))


def worst_points(n, rng, *, d=8):
    """Logits at the extremes of a minimax polynomial's error, values of opposite sign.

    The keys sit where the polynomial of the method's own degree is too large and
    where it is too small, so that every row's error adds up.
    """
    from fastattn.methods.polynomial.expansions import relative_minimax

    t = np.linspace(-1, 1, 4001)
    coefficients, _ = relative_minimax(5, 1.0)
    error = np.polynomial.polynomial.polyval(t, coefficients) * np.exp(-t) - 1
    high, low = t[np.argmax(error)], t[np.argmin(error)]
    query, key = np.zeros((2, n, d))
    query[:, 0] = 1
    # opposite pairs keep the mean of the keys in place: centring cannot help
    along = np.resize([high, low, -1.0, 1.0], n)
    key[:, 0] = along
    key[:, 1] = np.sqrt(1 - along**2) * rng.choice([-1, 1], n)
    query[: n // 2] *= -1
    value = np.sign(np.interp(along, t, error))[:, None] * np.ones((1, d))
    return tuple(x.astype(np.float32) for x in (query, key, value))


def iid(n, rng, *, largest, d=64):
    """Gaussian rows whose largest ``|logit|`` at scale ``d ** -0.5`` is given."""
    query, key, value = gaussian(n, rng, d=d)
    return *_stretched(query, key, largest), value


def low_dimensional(n, rng, *, largest, d=64, within=8, noise=0.05):
    """Query and key near one subspace of ``within`` dimensions."""
    basis = np.linalg.qr(rng.standard_normal((d, within)))[0].T
    query, key = (
        (rng.standard_normal((n, within)) @ basis + noise * rng.standard_normal((n, d)))
        for _ in range(2)
    )
    value = rng.standard_normal((n, d)).astype(np.float32)
    query, key = query.astype(np.float32), key.astype(np.float32)
    return *_stretched(query, key, largest), value


def _stretched(query, key, largest):
    """Scale both alike so that no logit of 1024 queries exceeds ``largest``."""
    logits = query[:1024] @ key.T / query.shape[1] ** 0.5
    factor = np.float32((largest / np.abs(logits).max()) ** 0.5)
    return query * factor, key * factor


CASES = {
    case.name: case
    for case in (
        Case("bounded", gaussian, 0.3 / 8, 3e-2),
        Case("unit", unit_rows, 1.0, 1e-4, {"guarantee": "proven"}),
        Case("worst", worst_points, 1.0, 1e-4, {"guarantee": "proven"}),
        Case("iid1", partial(iid, largest=1.0), 1 / 8, 1e-1),
        Case("iid4", partial(iid, largest=4.0), 1 / 8, 1e-1),
        Case("lowdim", partial(low_dimensional, largest=4.0), 1 / 8, 1e-1),
    )
}


def heads_of(path: str):
    """Yield name, query, key, value, scale of every head of a file of q, k, v.

    ``FILE@N`` takes the first N rows of each.
    """
    from fastattn.files.formats import read_inputs

    path, mark, rows = path.partition("@")
    query, key, value, _ = read_inputs(path)
    stem = path.rpartition("/")[2].removesuffix(".npz") + mark + rows
    end = int(rows) if mark else None
    for h in range(len(query)):
        arrays = tuple(
            np.asarray(x[h, :end], dtype=np.float32) for x in (query, key, value)
        )
        yield f"{stem}[{h}]", *arrays, query.shape[-1] ** -0.5


def packaged_heads():
    """Yield the heads of the packaged samples in the same form."""
    for name in fastattn.sample_names():
        query, key, value = fastattn.load_sample(name)
        for h in range(len(query)):
            yield f"{name}[{h}]", query[h], key[h], value[h], query.shape[-1] ** -0.5
