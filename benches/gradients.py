"""The study of derivatives: exact against torch's, low rank against its own call."""

import numpy as np

import fastattn
from benches.cases import CASES
from benches.measure import faster, torch_or_none


def gradients(*, quick):
    """Time of `attention_vjp`: over torch's backward, and over a forward call."""
    rng = np.random.default_rng(0)
    rows = [_exact(n, rng) for n in ((4096,) if quick else (4096, 8192, 16384))]
    return rows + [_lowrank(n, rng) for n in ((16384,) if quick else (32768, 65536))]


def _exact(n, rng, d=64):
    """The whole derivative, with the forward pass in it, against the backward alone."""
    arrays = [rng.standard_normal((n, d)).astype(np.float32) for _ in range(4)]
    theirs = _backward(*arrays, scale=d**-0.5)

    def call():
        return fastattn.attention_vjp(*arrays, method=fastattn.Exact(), rng=0)

    error = _largest_error(call(), theirs())
    assert error < 1e-4
    ratio = faster(call, theirs)
    return _row("Exact()", n, error, "torch's backward", ratio)


def _lowrank(n, rng):
    """A bounded input at its tolerance, of which three times is allowed."""
    case = CASES["bounded"]
    arrays = [*case.inputs(n, rng), rng.standard_normal((n, 64)).astype(np.float32)]
    options = {"scale": case.scale, "tol": case.tol, "rng": 0}

    def call():
        return fastattn.attention_vjp(*arrays, **options)

    def forward():
        return fastattn.attention(*arrays[:3], **options)

    double = [x.astype(np.float64) for x in arrays]
    error = _largest_error(call(), _backward(*double, scale=case.scale)())
    assert error <= 3 * case.tol
    ratio = faster(call, forward)
    return _row(f"Auto(), tol {case.tol:g}", n, error, "its forward call", ratio)


def _backward(query, key, value, grad, *, scale):
    """Prepare torch's backward pass of one head, in the dtype of the arrays."""
    torch = torch_or_none()
    leaves = [torch.from_numpy(x)[None, None] for x in (query, key, value)]
    for leaf in leaves:
        leaf.requires_grad_()
    attend = torch.nn.functional.scaled_dot_product_attention
    output = attend(*leaves, scale=scale)
    grad = torch.from_numpy(grad)[None, None]

    def call():
        slopes = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        return [x[0, 0].numpy() for x in slopes]

    return call


def _largest_error(found, truth):
    """Largest of the three relative Frobenius errors."""
    return max(
        float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for x, y in zip(found, truth, strict=True)
    )


def _row(method, n, error, opponent, ratio):
    return {
        "method": method,
        "n": n,
        "largest error": error,
        "over": opponent,
        "time": 1 / ratio.median,
        "least": 1 / ratio.high,
        "most": 1 / ratio.low,
    }
