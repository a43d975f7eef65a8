"""Fast approximate attention with a certificate on every answer."""

from typing import TYPE_CHECKING

from sketching._lib.exports import exports as _exports

if TYPE_CHECKING:
    from fastattn._attention import approximate as approximate
    from fastattn._attention import attention as attention
    from fastattn._attention import explain as explain
    from fastattn._explanation import Explanation as Explanation
    from fastattn._planner import Auto as Auto
    from fastattn._prepared import Prepared as Prepared
    from fastattn.exact import Exact as Exact
    from fastattn.feature_maps import Cosformer as Cosformer
    from fastattn.feature_maps import EluPlusOne as EluPlusOne
    from fastattn.feature_maps import Identity as Identity
    from fastattn.feature_maps import Relu as Relu
    from fastattn.feature_maps import Taylor as Taylor
    from fastattn.gradients import attention_vjp as attention_vjp
    from fastattn.gradients import loss_gradient as loss_gradient
    from fastattn.linear import linear_attention as linear_attention
    from fastattn.linear import linear_attention_vjp as linear_attention_vjp
    from fastattn.linear_state import LinearState as LinearState
    from fastattn.merging import merge_answers as merge_answers
    from fastattn.multipole import Multipole as Multipole
    from fastattn.polynomial import Polynomial as Polynomial
    from fastattn.polynomial_sketches import PolySketch as PolySketch
    from fastattn.polynomial_sketches import TensorSketch as TensorSketch
    from fastattn.prepared import load as load
    from fastattn.prepared import prepare as prepare
    from fastattn.quantized import Quantized as Quantized
    from fastattn.random_features import RandomFeatures as RandomFeatures
    from fastattn.random_features import RandomMaclaurin as RandomMaclaurin
    from fastattn.samples import load_sample as load_sample
    from fastattn.samples import sample_names as sample_names
    from fastattn.tensor import tensor_attention as tensor_attention
    from fastattn.tensor_mechanisms import PathAttention as PathAttention
    from fastattn.tensor_mechanisms import StrassenAttention as StrassenAttention
    from fastattn.tensor_mechanisms import TensorWindow as TensorWindow
    from sketching._lib.certificate import Approximation as Approximation
    from sketching._lib.certificate import Certificate as Certificate
    from sketching._lib.certificate import RefusalError as RefusalError

# where each public name lives; a module is imported when one of its names is first used
_HOMES = {
    "fastattn._attention": ("approximate", "attention", "explain"),
    "fastattn._explanation": ("Explanation",),
    "fastattn._planner": ("Auto",),
    "fastattn._prepared": ("Prepared",),
    "fastattn.exact": ("Exact",),
    "fastattn.feature_maps": ("Cosformer", "EluPlusOne", "Identity", "Relu", "Taylor"),
    "fastattn.gradients": ("attention_vjp", "loss_gradient"),
    "fastattn.linear": ("linear_attention", "linear_attention_vjp"),
    "fastattn.linear_state": ("LinearState",),
    "fastattn.merging": ("merge_answers",),
    "fastattn.multipole": ("Multipole",),
    "fastattn.polynomial": ("Polynomial",),
    "fastattn.polynomial_sketches": ("PolySketch", "TensorSketch"),
    "fastattn.prepared": ("load", "prepare"),
    "fastattn.quantized": ("Quantized",),
    "fastattn.random_features": ("RandomFeatures", "RandomMaclaurin"),
    "fastattn.samples": ("load_sample", "sample_names"),
    "fastattn.tensor": ("tensor_attention",),
    "fastattn.tensor_mechanisms": (
        "PathAttention",
        "StrassenAttention",
        "TensorWindow",
    ),
    "sketching._lib.certificate": ("Approximation", "Certificate", "RefusalError"),
}

__all__, __getattr__, __dir__ = _exports(__name__, _HOMES)

__version__ = "0.1.0"
