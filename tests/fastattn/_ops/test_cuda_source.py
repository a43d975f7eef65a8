"""CUDA source without a device: nvcc compiles it, and g++ runs it as fibers."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from tests.cuda_emulation import KERNEL, Kernel, emulated, run
from tests.fastattn._ops.test_gpu import BodyLaws
from tests.fastattn._ops.test_gpu_wide import WideLaws
from tests.fastattn.linear import test_feature_maps, test_linear_ops
from tests.fastattn.methods.lowrank import test_lowrank
from tests.fastattn.methods.multipole import test_clusters, test_multipole
from tests.fastattn.prepared.clusters import test_multipole_rows

FOLDER = Path(fastattn.__file__).parent / "_ops/gpu"
SOURCES = sorted(FOLDER.glob("*.cu"))
KERNELS = sorted(FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_a_warning(source, real):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    # registers that spill to memory are a warning too
    strict = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills"]
    for arch in ("sm_80", "sm_90"):
        target = ["-std=c++17", f"-arch={arch}", "-cubin", "-o", "/dev/null"]
        run([nvcc, *target, *strict, f"-DREAL={real}", str(source)])


def test_every_source_has_kernels():
    for path in SOURCES:
        text = path.read_text()
        assert len(KERNEL.findall(text)) == text.count("__global__") > 0


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
def test_emulation_tells_a_missing_barrier(tmp_path, falling):
    source = """
    extern "C" __global__ __launch_bounds__(64) void turn(REAL* x) {
        __shared__ REAL copy[64];
        copy[threadIdx.x] = x[threadIdx.x];
        BARRIER;
        x[threadIdx.x] = copy[63 - threadIdx.x];
    }"""
    got = []
    for barrier in ("__syncthreads()", "(void)0"):
        text = source.replace("BARRIER", barrier)
        x = np.arange(64.0)
        Kernel(text, "turn", ("-DREAL=double",), tmp_path, falling)((1,), (64,), (x,))
        got.append(x.tolist())
    assert got[0] == list(range(64))[::-1]
    assert got[1] != got[0]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_cupy_has_what_kernels_ask_of_it(path):
    # NumPy stands in for it below, and has more
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    names = set(re.findall(r"\bcp\.(\w+)", path.read_text()))
    assert names
    assert [name for name in sorted(names) if not hasattr(cupy, name)] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where emulated kernels are compiled, once for each precision."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module", params=[False, True], ids=["rising", "falling"])
def gpu(folder, request):
    with emulated(folder, request.param) as module:
        softmax, monomials = module("softmax"), module("monomials")
    return SimpleNamespace(
        asarray=np.array,
        asnumpy=np.asarray,
        attend=softmax.attend,
        monomials=monomials.monomials,
        moments=monomials.moments,
        means=monomials.means,
    )


# NumPy warns of infinities that CuPy and the references take without a word
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestEmulated(BodyLaws):
    # the emulator is there for barriers and indices
    dtypes, sizes = [np.float32], [1, 33, 129]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestEmulatedInFull(BodyLaws):
    pass


@pytest.fixture(scope="class")
def device(folder, request):
    """Arrays of CuPy are on the emulated device meanwhile."""
    with emulated(folder, getattr(request, "param", False)):
        yield


@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class EmulatedLaws:
    """The laws of an op, for its GPU kernel on the emulated device."""

    def places(self):
        return ["gpu"]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "device", [False, True], ids=["rising", "falling"], indirect=True, scope="class"
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
class TestWideEmulated(WideLaws):
    pass


LAWS = [
    test_lowrank.TestKeySums,
    test_lowrank.TestKeySumsOfPolynomials,
    test_lowrank.TestKeySumsOfLandmarks,
    test_lowrank.TestQueryMeans,
    test_clusters.TestRegroup,
    test_multipole.TestDescribe,
    test_multipole.TestMultipoleOp,
    test_multipole.TestMultipoleOpWithoutFarKeys,
    test_multipole.TestMultipoleOpWithoutNearKeys,
    test_multipole_rows.TestSummarise,
    test_feature_maps.TestEluPlusOne,
    test_feature_maps.TestSquares,
    test_linear_ops.TestPrefixProducts,
    test_linear_ops.TestFadingPrefixProducts,
]
# two of them with barriers for every run
QUICK = test_lowrank.TestKeySums, test_linear_ops.TestPrefixProducts
for laws in LAWS:
    name = f"{laws.__name__}Emulated"
    marks = [] if laws in QUICK else [pytest.mark.slow]
    globals()[name] = type(name, (EmulatedLaws, laws), {"pytestmark": marks})
