"""The study of linear attention: time over the same maps in torch, and its growth."""

import numpy as np

import fastattn
from benches.cases import gaussian
from benches.measure import exponent, faster, seconds, spread, torch_or_none

torch = torch_or_none()
_LONGEST = 4


def linear(*, quick):
    """Each feature map: time over torch's, causal over whole, exponent in n."""
    n = 8192 if quick else 65536
    return [_row(feature_map, features, n) for feature_map, features in _maps(n)]


def _maps(n):
    """Yield feature maps with the same in torch; random ones with our numbers."""
    yield fastattn.EluPlusOne(), lambda x: torch.nn.functional.elu(x) + 1
    yield fastattn.Relu(), torch.relu
    yield fastattn.Identity(), lambda x: x
    angle = torch.arange(n, dtype=torch.float64)[:, None]
    angle = angle * (np.pi / 2 / (_LONGEST * n))

    def cosformer(x):
        cosine, sine = (f(angle).to(x.dtype) for f in (torch.cos, torch.sin))
        x = torch.relu(x)
        return torch.cat((x * cosine, x * sine), dim=-1)

    yield fastattn.Cosformer(_LONGEST * n), cosformer
    made = fastattn.RandomFeatures(256)
    (directions,) = (torch.from_numpy(x) for x in made.draw(64))

    def favor(x):
        # as performer-pytorch: the largest exponent is subtracted in queries and keys
        x = x * 64**-0.25
        along = x @ directions.to(x.dtype) - (x * x).sum(dim=-1, keepdim=True) / 2
        return torch.exp(along - along.amax())

    yield made, favor


def _error(answer, sums, total):
    """Relative error of the rows whose weights do not cancel to a hundredth."""
    size = np.abs(total[:, 0])
    kept = size >= 1e-2 * np.median(size)
    truth = sums[kept] / total[kept]
    return float(np.linalg.norm(answer[kept] - truth) / np.linalg.norm(truth))


def _row(feature_map, features, n, d=64):
    # longer ones for the exponent: shorter arrays would stay in cache
    arrays = gaussian(_LONGEST * n, np.random.default_rng(0), d=d)
    tensors = [torch.from_numpy(x[:n]) for x in arrays]

    def ours(is_causal=False, n=n):
        some = [x[:n] for x in arrays]
        return fastattn.linear_attention(
            *some, feature_map=feature_map, is_causal=is_causal
        )

    def sums(tensors):
        query, key, value = features(tensors[0]), features(tensors[1]), tensors[2]
        total = query @ key.sum(dim=-2)[..., None]
        return query @ (key.mT @ value), total

    def theirs():
        with torch.inference_mode():
            value, total = sums(tensors)
            return value.div_(total)

    error = _error(ours(), *(x.numpy() for x in sums([x.double() for x in tensors])))
    assert error < 1e-4
    ratio = faster(ours, theirs, pairs=9)
    causal = faster(ours, lambda: ours(is_causal=True), pairs=9)
    sizes = [n // 2, n, 2 * n, _LONGEST * n]
    # in turn, so that slow moments of the machine affect all sizes
    rounds = [[seconds(lambda s=s: ours(n=s)) for s in sizes] for _ in range(9)]
    times = [min(each) for each in zip(*rounds, strict=True)]
    return {
        "feature map": str(feature_map),
        "n": n,
        "error": error,
        **spread("times faster than torch", ratio),
        **spread("causal over whole", causal),
        "exponent in n": exponent(sizes, times),
    }
