"""Hard instances: where fast attention must fail, as runnable evidence."""

from typing import TYPE_CHECKING

from sketching._lib.exports import exports as _exports

if TYPE_CHECKING:
    from lowerbounds._attention_instance import AttentionInstance as AttentionInstance
    from lowerbounds._instance import VectorInstance as VectorInstance
    from lowerbounds.amplification import amplify_gap as amplify_gap
    from lowerbounds.audit import AuditRow as AuditRow
    from lowerbounds.audit import at_allowed_error as at_allowed_error
    from lowerbounds.audit import audit_methods as audit_methods
    from lowerbounds.budgets import at_entry_bound as at_entry_bound
    from lowerbounds.budgets import best_of_rank as best_of_rank
    from lowerbounds.budgets import polynomial_within as polynomial_within
    from lowerbounds.reductions import decide as decide
    from lowerbounds.reductions import reduce_to_attention as reduce_to_attention
    from lowerbounds.satisfiability import from_cnf as from_cnf
    from lowerbounds.satisfiability import random_formula as random_formula
    from lowerbounds.threshold import ThresholdRow as ThresholdRow
    from lowerbounds.threshold import threshold_sweep as threshold_sweep
    from lowerbounds.transitions import Transition as Transition
    from lowerbounds.transitions import fit_transitions as fit_transitions
    from lowerbounds.vectors import expected_solutions as expected_solutions
    from lowerbounds.vectors import gap_inner_product as gap_inner_product
    from lowerbounds.vectors import least_dimension as least_dimension
    from lowerbounds.vectors import orthogonal_vectors as orthogonal_vectors

# where each public name lives; a module is imported when one of its names is first used
_HOMES = {
    "lowerbounds._attention_instance": ("AttentionInstance",),
    "lowerbounds._instance": ("VectorInstance",),
    "lowerbounds.amplification": ("amplify_gap",),
    "lowerbounds.audit": ("AuditRow", "at_allowed_error", "audit_methods"),
    "lowerbounds.budgets": ("at_entry_bound", "best_of_rank", "polynomial_within"),
    "lowerbounds.reductions": ("decide", "reduce_to_attention"),
    "lowerbounds.satisfiability": ("from_cnf", "random_formula"),
    "lowerbounds.threshold": ("ThresholdRow", "threshold_sweep"),
    "lowerbounds.transitions": ("Transition", "fit_transitions"),
    "lowerbounds.vectors": (
        "expected_solutions",
        "gap_inner_product",
        "least_dimension",
        "orthogonal_vectors",
    ),
}

__all__, __getattr__, __dir__ = _exports(__name__, _HOMES)
