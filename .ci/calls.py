"""The calls of the demo and of the README, for restricted environments.

``python .ci/calls.py`` exits 0 if every answer is right: with the lowest versions of
all dependencies, from a read-only installation, without a home, without a compiler.
"""

import tempfile
from pathlib import Path

import numpy as np

import fastattn
import lowerbounds
import sketching
from fastattn.cli import main as cli


def attend() -> None:
    """Answer real heads, cut short, to a tolerance; keep keys; differentiate."""
    query, key, value = (x[:2, :400] for x in fastattn.load_sample("minilm-mixed"))
    wanted = fastattn.attention(query, key, value, method=fastattn.Exact())
    for method in (None, fastattn.Polynomial(degree=2)):
        answer = fastattn.approximate(query, key, value, tol=2, method=method, rng=0)
        error = np.linalg.norm(answer.value - wanted) / np.linalg.norm(wanted)
        assert error <= answer.certificate.error.max() + 1e-6, error
    assert "Exact" in str(fastattn.explain(query, key, value))
    kept = fastattn.prepare(key, value, queries=query, rng=0)
    with tempfile.TemporaryDirectory() as folder:
        kept.save(f"{folder}/keys.npz")
        again = fastattn.load(f"{folder}/keys.npz").query(query).value
        np.testing.assert_allclose(again, wanted, atol=1e-4)
        out = Path(folder, "out.npz")
        np.savez(f"{folder}/in.npz", q=query, k=key, v=value)
        assert cli.main(["attend", f"{folder}/in.npz", "-o", str(out)]) == 0
        with np.load(out) as file:
            np.testing.assert_allclose(file["out"], wanted, atol=1e-4)
    slopes = fastattn.attention_vjp(query, key, value, wanted, rng=0)
    assert all(np.isfinite(x).all() for x in slopes)
    one, two = query[0, :40], key[0, :40]
    assert fastattn.tensor_attention(one, (two, two), (one, two)).shape == one.shape
    fastattn.linear_attention(query, key, value, feature_map=fastattn.EluPlusOne())


def measure() -> None:
    """Find neighbours and clusters under a metric that changes."""
    points = np.random.default_rng(0).standard_normal((500, 6))
    neighbors = sketching.MahalanobisNeighbors(n_neighbors=3).fit(points)
    _, numbers = neighbors.kneighbors(points)
    assert (numbers[:, 0] == np.arange(500)).all()
    index = sketching.MahalanobisIndex(sketching.MahalanobisMetric(np.eye(6)), rng=0)
    index.insert(points)
    index.update_metric(np.ones(6), np.ones(6))
    with tempfile.TemporaryDirectory() as folder:
        index.save(f"{folder}/index.npz")
        again = sketching.load(f"{folder}/index.npz")
    np.testing.assert_array_equal(
        again.kneighbors(points[:9], 4)[1], index.kneighbors(points[:9], 4)[1]
    )
    labels = sketching.MahalanobisKMeans(4, random_state=0).fit_predict(points)
    assert set(labels) == {0, 1, 2, 3}
    sketching.HadamardProjection.draw(6, size=4, rng=0).apply(points)


def decide() -> None:
    """Decide formulas by attention, and by enumeration of all pairs."""
    for seed in range(3):
        instance = lowerbounds.from_cnf(lowerbounds.random_formula(10, rng=seed))
        assert lowerbounds.decide(instance) is instance.has_solution


def demo() -> None:
    """Run the demo on one layer."""
    with tempfile.TemporaryDirectory() as folder:
        picture = f"{folder}/demo.png"
        options = ["--samples", "minilm-mixed", "--tol", "0.1", "--picture", picture]
        assert cli.main(["demo", *options]) == 0
        assert Path(picture).read_bytes().startswith(b"\x89PNG")


if __name__ == "__main__":
    attend()
    measure()
    decide()
    demo()
