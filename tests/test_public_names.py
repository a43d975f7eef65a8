"""What code outside relies on: exported names, public modules, and where files lie."""

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest

import fastattn
import fastattn.estimators
import lowerbounds
import sketching
import sketching.estimators

ROOT = Path(__file__).parent.parent
EXPORTED = {
    fastattn: """
        Approximation Auto Certificate Cosformer EluPlusOne Exact Explanation Identity
        LinearState Multipole PathAttention PolySketch Polynomial Prepared Quantized
        RandomFeatures RandomMaclaurin RefusalError Relu StrassenAttention Taylor
        TensorSketch TensorWindow approximate attention attention_vjp explain
        linear_attention linear_attention_vjp load load_sample loss_gradient
        merge_answers prepare sample_names tensor_attention
    """,
    sketching: """
        Adaptive Approximation Certificate Exact Filter GaussianProjection
        HadamardProjection HingeGradient Itml Lego MahalanobisIndex MahalanobisKMeans
        MahalanobisKMedians MahalanobisKNeighborsClassifier
        MahalanobisKNeighborsRegressor MahalanobisKNeighborsTransformer
        MahalanobisMetric MahalanobisNeighbors Neighbors Pola RefusalError
        SparseProjection TensorSketch load
    """,
    lowerbounds: """
        AttentionInstance AuditRow ThresholdRow Transition VectorInstance amplify_gap
        at_allowed_error at_entry_bound audit_methods best_of_rank decide
        expected_solutions fit_transitions from_cnf gap_inner_product least_dimension
        orthogonal_vectors polynomial_within random_formula reduce_to_attention
        threshold_sweep
    """,
}
PACKAGES = pytest.mark.parametrize("package", EXPORTED, ids=lambda x: x.__name__)
# rooms whose names are imported through them
OPEN_ROOMS = {"sketching/estimators"}


@PACKAGES
def test_exported_names_are_these(package):
    assert sorted(package.__all__) == sorted(EXPORTED[package].split())


def test_estimators_are_where_scikit_learn_users_look():
    names = "RandomFeatureSampler", "TensorSketchSampler"
    assert all(isinstance(getattr(fastattn.estimators, name), type) for name in names)
    names = [name for name in sketching.__all__ if hasattr(sketching.estimators, name)]
    assert sorted(names) == sorted(sketching.estimators.__all__)
    assert len(names) == 6
    for name in names:
        assert getattr(sketching, name) is getattr(sketching.estimators, name)


@PACKAGES
def test_exported_names_are_pickled_by_where_they_are(package):
    for name in package.__all__:
        export = getattr(package, name)
        assert pickle.loads(pickle.dumps(export)) is export


@pytest.mark.parametrize(
    "method",
    [
        fastattn.Auto(),
        fastattn.Exact(),
        fastattn.Multipole(),
        fastattn.Polynomial(degree=3),
        fastattn.Quantized(),
        fastattn.RandomFeatures(size=8),
        sketching.Exact(),
        sketching.Filter(),
        sketching.Adaptive(),
    ],
    ids=repr,
)
def test_recipes_are_pickled(method):
    assert pickle.loads(pickle.dumps(method)) == method


@PACKAGES
def test_no_module_hides_an_exported_name(package):
    # an import of the module would put it in the place of the export
    folder = Path(package.__file__).parent
    entries = {path.stem for path in folder.iterdir()}
    assert not entries & set(package.__all__)


@PACKAGES
def test_rooms_say_what_they_hold_and_import_nothing(package):
    # importing one module of a room must not load the others
    for path in Path(package.__file__).parent.rglob("__init__.py"):
        room = path.parent
        inner = room.relative_to(ROOT)
        if len(inner.parts) == 1 or "_ops" in inner.parts or str(inner) in OPEN_ROOMS:
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert ast.get_docstring(ast.Module(body, [])), path


def test_a_newcomer_sees_few_entries():
    folder = Path(fastattn.__file__).parent
    entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 22


def test_saved_files_do_not_depend_on_where_classes_are(tmp_path):
    rng = np.random.default_rng(0)
    key, value, queries = rng.standard_normal((3, 300, 4))
    methods = {
        "exact": fastattn.Exact(),
        "polynomial": fastattn.Polynomial(degree=2, basis="hermite"),
        "multipole": fastattn.Multipole(clusters=4),
    }
    for name, method in methods.items():
        path = tmp_path / f"{name}.npz"
        kept = fastattn.prepare(
            key, value, queries=queries, method=method, tol=10.0, rng=0
        )
        kept.save(path)
        assert_no_module(path, "meta")
    index = sketching.MahalanobisIndex(sketching.MahalanobisMetric(np.eye(4)), rng=0)
    index.insert(key)
    index.save(tmp_path / "index.npz")
    assert_no_module(tmp_path / "index.npz", "header")


def assert_no_module(path, header):
    with np.load(path) as file:
        text = str(file[header])
    # the names of the formats
    for name in ("fastattn.prepared", "sketching.MahalanobisIndex"):
        text = text.replace(f'"{name}"', "")
    assert "fastattn." not in text
    assert "sketching." not in text
