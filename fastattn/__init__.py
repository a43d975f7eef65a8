"""Fast approximate attention with a certificate on every answer."""

from typing import TYPE_CHECKING

from sketching._lib.exports import exports as _exports

if TYPE_CHECKING:
    from fastattn._attention import approximate as approximate
    from fastattn._attention import attention as attention
    from fastattn._attention import explain as explain
    from fastattn._tensor_attention import tensor_attention as tensor_attention
    from fastattn.gradients.vjp import attention_vjp as attention_vjp
    from fastattn.linear.attention import linear_attention as linear_attention
    from fastattn.linear.attention import linear_attention_vjp as linear_attention_vjp
    from fastattn.linear.feature_maps import Cosformer as Cosformer
    from fastattn.linear.feature_maps import EluPlusOne as EluPlusOne
    from fastattn.linear.feature_maps import Identity as Identity
    from fastattn.linear.feature_maps import Relu as Relu
    from fastattn.linear.feature_maps import Taylor as Taylor
    from fastattn.linear.polynomial_sketches import PolySketch as PolySketch
    from fastattn.linear.polynomial_sketches import TensorSketch as TensorSketch
    from fastattn.linear.random_features import RandomFeatures as RandomFeatures
    from fastattn.linear.random_features import RandomMaclaurin as RandomMaclaurin
    from fastattn.linear.state import LinearState as LinearState
    from fastattn.merging import merge_answers as merge_answers
    from fastattn.methods.exact import Exact as Exact
    from fastattn.methods.multipole.method import Multipole as Multipole
    from fastattn.methods.polynomial.method import Polynomial as Polynomial
    from fastattn.methods.quantized import Quantized as Quantized
    from fastattn.planning.auto import Auto as Auto
    from fastattn.planning.explanation import Explanation as Explanation
    from fastattn.prepared.prepare import load as load
    from fastattn.prepared.prepare import prepare as prepare
    from fastattn.prepared.structure import Prepared as Prepared
    from fastattn.regression.attention_loss import loss_gradient as loss_gradient
    from fastattn.samples import load_sample as load_sample
    from fastattn.samples import sample_names as sample_names
    from fastattn.tensor.mechanisms import PathAttention as PathAttention
    from fastattn.tensor.mechanisms import StrassenAttention as StrassenAttention
    from fastattn.tensor.mechanisms import TensorWindow as TensorWindow
    from sketching._lib.certificate import Approximation as Approximation
    from sketching._lib.certificate import Certificate as Certificate
    from sketching._lib.certificate import RefusalError as RefusalError

# the module of each public name, which is imported when one of its names is first used
_HOMES = {
    "fastattn._attention": ("approximate", "attention", "explain"),
    "fastattn._tensor_attention": ("tensor_attention",),
    "fastattn.gradients.vjp": ("attention_vjp",),
    "fastattn.linear.attention": ("linear_attention", "linear_attention_vjp"),
    "fastattn.linear.feature_maps": (
        "Cosformer",
        "EluPlusOne",
        "Identity",
        "Relu",
        "Taylor",
    ),
    "fastattn.linear.polynomial_sketches": ("PolySketch", "TensorSketch"),
    "fastattn.linear.random_features": ("RandomFeatures", "RandomMaclaurin"),
    "fastattn.linear.state": ("LinearState",),
    "fastattn.merging": ("merge_answers",),
    "fastattn.methods.exact": ("Exact",),
    "fastattn.methods.multipole.method": ("Multipole",),
    "fastattn.methods.polynomial.method": ("Polynomial",),
    "fastattn.methods.quantized": ("Quantized",),
    "fastattn.planning.auto": ("Auto",),
    "fastattn.planning.explanation": ("Explanation",),
    "fastattn.prepared.prepare": ("load", "prepare"),
    "fastattn.prepared.structure": ("Prepared",),
    "fastattn.regression.attention_loss": ("loss_gradient",),
    "fastattn.samples": ("load_sample", "sample_names"),
    "fastattn.tensor.mechanisms": (
        "PathAttention",
        "StrassenAttention",
        "TensorWindow",
    ),
    "sketching._lib.certificate": ("Approximation", "Certificate", "RefusalError"),
}

__all__, __getattr__, __dir__ = _exports(__name__, _HOMES)

__version__ = "0.1.0"
