"""Fast approximate attention with a certificate on every answer."""

from fastattn._attention import approximate as approximate
from fastattn._attention import attention as attention
from fastattn._attention import explain as explain
from fastattn._explanation import Explanation as Explanation
from fastattn._planner import Auto as Auto
from fastattn.exact import Exact as Exact
from fastattn.gradients import attention_vjp as attention_vjp
from fastattn.gradients import loss_gradient as loss_gradient
from fastattn.merging import merge_answers as merge_answers
from fastattn.multipole import Multipole as Multipole
from fastattn.polynomial import Polynomial as Polynomial
from fastattn.samples import load_sample as load_sample
from fastattn.samples import sample_names as sample_names
from sketching._lib.certificate import Approximation as Approximation
from sketching._lib.certificate import Certificate as Certificate
from sketching._lib.certificate import RefusalError as RefusalError

__all__ = [
    "Approximation",
    "Auto",
    "Certificate",
    "Exact",
    "Explanation",
    "Multipole",
    "Polynomial",
    "RefusalError",
    "approximate",
    "attention",
    "attention_vjp",
    "explain",
    "load_sample",
    "loss_gradient",
    "merge_answers",
    "sample_names",
]

__version__ = "0.1.0"
