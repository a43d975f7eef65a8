"""The study of derivatives: exact, by a low rank, causal, by clusters of the keys."""

import numpy as np

import fastattn
from benches.cases import CASES
from benches.heads import Head, case_head, file_heads
from benches.measure import faster, median_of, seconds, torch_or_none


def gradients(*, quick, data):
    """Time of `attention_vjp`: over torch's backward, and over a forward call.

    Heads of files are differentiated by clusters, and with a causal mask by the method
    that Auto() chooses, also against the exact derivative.
    """
    rng = np.random.default_rng(0)
    rows = [_exact(n, rng) for n in ((2048,) if quick else (4096, 8192, 16384))]
    rows += [_lowrank(n, rng) for n in ((4608,) if quick else (32768, 65536))]
    rounds = 1 if quick else 5
    case = CASES["bounded"]
    bounded = case_head("bounded", 4608 if quick else 32768)
    rows += _causal(bounded, rng, tol=case.tol, rounds=rounds)
    for head in file_heads(data):
        rows += _clusters(head, rng, rounds=rounds)
        rows += _causal(head, rng, tol=1e-1, rounds=rounds)
    return rows


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
    """A bounded input; errors up to three times its tolerance are allowed."""
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


def _clusters(head: Head, rng, *, rounds):
    """A real head by clusters, over its forward call and over two exact derivatives."""
    grad = rng.standard_normal(head.value.shape).astype(np.float32)
    arrays = *head.arrays, grad
    double = [x.astype(np.float64) for x in arrays]
    truth = _backward(*double, scale=head.scale)()
    rows = []
    for tol in (1e-1, 5e-2):
        options = {"scale": head.scale, "rng": 0}
        clusters = {**options, "tol": tol, "method": fastattn.Multipole()}
        exact = {**options, "method": fastattn.Exact()}
        opponents = {
            "its forward call": lambda o=clusters: fastattn.attention(*arrays[:3], **o),
            "Exact()": lambda o=exact: fastattn.attention_vjp(*arrays, **o),
            "torch's backward": _backward(*arrays, scale=head.scale),
        }

        def call(options=clusters):
            return fastattn.attention_vjp(*arrays, **options)

        name = f"Multipole(), tol {tol:g}, {head.name}"
        try:
            opponents["its forward call"]()
            error = _largest_error(call(), truth)
        except fastattn.RefusalError:
            rows.append({"method": f"{name}: refused", "n": len(head)})
            continue
        assert error <= 3 * tol
        ratios = _in_turn(call, opponents, rounds)
        rows += [_row(name, len(head), error, x, y) for x, y in ratios.items()]
    return rows


def _causal(head: Head, rng, *, tol, rounds):
    """A head with a causal mask, over its forward call and over exact derivatives."""
    grad = rng.standard_normal(head.value.shape).astype(np.float32)
    arrays = *head.arrays, grad
    options = {"scale": head.scale, "tol": tol, "is_causal": True, "rng": 0}
    double = [x.astype(np.float64) for x in arrays]
    truth = _backward(*double, scale=head.scale, is_causal=True)()
    opponents = {
        "its forward call": lambda: fastattn.attention(*arrays[:3], **options),
        "Exact()": lambda: fastattn.attention_vjp(
            *arrays, method=fastattn.Exact(), **options
        ),
        "torch's backward": _backward(*arrays, scale=head.scale, is_causal=True),
    }

    def call():
        return fastattn.attention_vjp(*arrays, **options)

    error = _largest_error(call(), truth)
    assert error <= 3 * tol
    name = f"Auto(), causal, tol {tol:g}, {head.name}"
    ratios = _in_turn(call, opponents, rounds)
    return [_row(name, len(head), error, x, y) for x, y in ratios.items()]


def _in_turn(call, opponents, rounds):
    """How many times faster a call is than each opponent, all timed in turn."""
    for other in opponents.values():
        other()
    ratios = {name: [] for name in opponents}
    for _ in range(rounds):
        own = seconds(call)
        for name, other in opponents.items():
            ratios[name].append(seconds(other) / own)
    return {name: median_of(x) for name, x in ratios.items()}


def _backward(query, key, value, grad, *, scale, is_causal=False):
    """Prepare torch's backward pass of one head, in the dtype of the arrays."""
    torch = torch_or_none()
    leaves = [torch.from_numpy(x)[None, None] for x in (query, key, value)]
    for leaf in leaves:
        leaf.requires_grad_()
    attend = torch.nn.functional.scaled_dot_product_attention
    output = attend(*leaves, scale=scale, is_causal=is_causal)
    grad = torch.from_numpy(grad)[None, None]

    def call():
        derivatives = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        return [x[0, 0].numpy() for x in derivatives]

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
