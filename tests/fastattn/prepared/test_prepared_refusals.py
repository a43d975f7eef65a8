"""What prepared structures refuse: wrong arguments, broken files, far queries."""

import json
import re
import zipfile

import numpy as np
import pytest

from fastattn import Exact, Polynomial, RefusalError, load, prepare
from tests.prepared_laws import problem

HERMITE = Polynomial(degree=2, basis="hermite")


def prepared(method=HERMITE, **more):
    query, key, value = problem()
    options = {"queries": query, "tol": 0.1, "method": method, "rng": 0, **more}
    return prepare(key, value, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": [[1.0]]}, TypeError, "list"),
        ({"queries": np.ones((3, 5))}, ValueError, "query has 5 columns"),
        ({"queries": np.full((3, 6), np.nan)}, ValueError, "query: .*18 NaN"),
        ({"queries": np.ones((3, 6), np.float32)}, TypeError, "one dtype"),
        ({"tol": 0}, ValueError, "tol"),
        ({"guarantee": "sure"}, ValueError, "guarantee"),
        ({"scale": np.inf}, ValueError, "scale"),
        ({"method": "exact"}, TypeError, "method"),
        ({"key_mask": np.ones(3, bool)}, ValueError, "key_mask"),
        ({"rng": "a"}, TypeError, "rng"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        prepared(**change)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (np.ones((3, 5)), ValueError, "query: expected 6 columns"),
        (np.ones(6), ValueError, "query: expected at least 2 dimensions"),
        (np.ones((0, 6)), ValueError, "query: expected a non-empty"),
        (np.ones((2, 3, 6)), ValueError, "query: leading dimensions"),
        (np.ones((3, 6), np.float32), TypeError, "query: expected float64"),
        (np.full((3, 6), np.inf), ValueError, "query: .*18 NaN"),
        ([[1.0] * 6], TypeError, "list"),
    ],
)
def test_wrong_queries_are_named(query, error, message):
    with pytest.raises(error, match=message):
        prepared().query(query)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (np.ones((3, 5)), np.ones((3, 3)), ValueError, "key: expected 6 columns"),
        (np.ones((3, 6)), np.ones((3, 4)), ValueError, "value: expected 3 columns"),
        (np.ones((3, 6)), np.ones((2, 3)), ValueError, "key has 3 rows and value"),
        (np.ones((3, 6), "f4"), np.ones((3, 3)), TypeError, "key: expected float64"),
        (np.ones((3, 6)), np.ones((3, 3), int), TypeError, "value: expected float64"),
        (np.ones((2, 3, 6)), np.ones((2, 3, 3)), ValueError, "key: leading"),
        (np.ones((3, 6)), np.full((3, 3), np.nan), ValueError, "value: .*9 NaN"),
    ],
)
def test_wrong_keys_are_named_and_change_nothing(key, value, error, message):
    found = prepared()
    with pytest.raises(error, match=message):
        found.insert(key, value)
    assert found.count == 900


def test_masked_arrays_are_refused():
    found = prepared()
    key = np.ma.masked_array(np.ones((3, 6)), mask=False)
    with pytest.raises(TypeError, match="key_mask"):
        found.insert(key, np.ones((3, 3)))


def test_another_library_is_refused():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict missing")
    found = prepared()
    with pytest.raises(TypeError, match="one library"):
        found.query(strict.asarray(np.ones((3, 6))))


def test_far_queries_are_refused_with_their_number():
    found = prepared()
    query = problem()[0][:300].copy()
    query[[7, 11]] *= 100
    with pytest.raises(RefusalError, match=r"2 of 300 queries \(rows 7, 11\)"):
        found.query(query)
    assert prepared(Exact()).query(query).value.shape == (300, 3)


def test_a_method_that_misses_the_tolerance_is_refused():
    with pytest.raises(RefusalError, match=r"misses tol=1e-09.*raise tol"):
        prepared(tol=1e-9)


def test_a_tolerance_that_is_lost_is_refused_with_the_numbers():
    found, (query, key, value) = prepared(tol=0.002), problem()
    found.query(query)
    found.insert(3 * key, value)
    error = found.certificate.error
    assert error > 0.002
    message = rf"misses tol=0.002 after 1800 keys: {error:.2e}"
    with pytest.raises(RefusalError, match=re.escape(message)):
        found.query(query)


def test_few_queries_do_not_certify_sums():
    with pytest.raises(RefusalError, match="queries: 255 are too few"):
        prepared(queries=problem()[0][:255])


def test_sharp_heads_have_no_sums():
    query, key, value = problem()
    with pytest.raises(RefusalError):
        prepare(50 * key, value, queries=query, method=HERMITE, rng=0)


def test_other_methods_cannot_be_prepared():
    class Other:
        solve = None

    with pytest.raises(TypeError, match="cannot be prepared"):
        prepared(Other())


@pytest.mark.parametrize(
    "method",
    [HERMITE, Polynomial(degree=2), Polynomial(landmarks=30), Exact()],
    ids=["hermite", "monomials", "landmarks", "exact"],
)
def test_structures_planned_apart_are_not_merged(method):
    found, other = prepared(method), prepared(method, rng=1)
    if isinstance(method, Exact):
        assert found.merge(other).count == 1800
        return
    with pytest.raises(ValueError, match=r"planned apart.*prepared.empty\(\)"):
        found.merge(other)
    assert found.count == 900
    assert found.merge(found.empty()).count == 900


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (1, TypeError, "expected a Prepared"),
        ({"tol": 0.2}, ValueError, "tol=0.1, got 0.2"),
        ({"scale": 1.0}, ValueError, "scale"),
        ({"method": Exact()}, ValueError, "planned apart"),
    ],
)
def test_merging_with_another_kind_says_what_differs(other, error, message):
    found = prepared()
    other = prepared(**other) if isinstance(other, dict) else other
    with pytest.raises(error, match=message):
        found.merge(other)


@pytest.fixture
def file(tmp_path):
    prepared().save(tmp_path / "keys.npz")
    return tmp_path / "keys.npz"


def test_files_are_written_whole_or_not_at_all(tmp_path):
    found = prepared()
    with pytest.raises(ValueError, match=r"keys.safetensors: .*\.npz"):
        found.save(tmp_path / "keys.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        found.save(tmp_path / "none" / "keys.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load(file)


def test_a_flipped_bit_is_found(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.ones(3)}, "no prepared structure"),
        ({"meta": np.array("{}")}, "expected 'fastattn.prepared'"),
        ({"meta": np.array("[1]")}, "no JSON object"),
        ({"meta": np.array("x")}, "no JSON"),
        ({"meta": np.array([object()])}, "Object arrays cannot be loaded"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other.npz"
    np.savez(path, **content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{message}"):
        load(path)


def rewritten(file, change):
    """Change the header of a file."""
    with np.load(file) as members:
        arrays = dict(members)
    header = json.loads(str(arrays.pop("meta")))
    change(header, arrays)
    np.savez(file, **arrays, meta=np.array(json.dumps(header)))


def test_newer_files_are_refused(file):
    def newer(header, arrays):
        header.update(version=3, library="9.0")

    rewritten(file, newer)
    message = rf"{re.escape(str(file))}: .*version 3 .*fastattn 9.0.*up to 2"
    with pytest.raises(ValueError, match=message):
        load(file)


def test_files_of_version_1_hold_seconds_and_are_read(file):
    def older(header, _):
        header["version"] = 1
        for head in header["heads"]:
            assert head["plan"].pop("work") > 0
            head["plan"]["predicted_seconds"] = 0.1

    query, before = problem()[0], load(file)
    rewritten(file, older)
    after = load(file)
    np.testing.assert_array_equal(after.query(query).value, before.query(query).value)
    assert after.plan.method == before.plan.method
    assert np.isnan(after.plan.work)


def test_files_that_lack_an_array_are_refused(file):
    rewritten(file, lambda _, arrays: arrays.pop("0/sums"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: lacks 'sums'"):
        load(file)


def test_missing_files_and_other_formats_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")
    path = tmp_path / "text.npz"
    path.write_text("no archive")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*not a zip"):
        load(path)


def test_files_hold_no_pickles(file):
    with zipfile.ZipFile(file) as archive:
        assert all(name.endswith(".npy") for name in archive.namelist())
    with np.load(file, allow_pickle=False) as members:
        assert all(not members[name].dtype.hasobject for name in members.files)


def test_loading_for_another_dtype_is_refused(file):
    with pytest.raises(ValueError, match="holds float64 keys, but like is float32"):
        load(file, like=np.ones(3, np.float32))
