"""Instruction sets that only some processors have."""

from functools import cache

from llvmlite import binding
from numba import config


@cache
def has(*names: str) -> bool:
    """Whether numba compiles here for a processor with such features of LLVM's."""
    settings = vars(config)
    # whoever compiles for another processor than this one names it
    if any(settings[name] for name in ("CPU_NAME", "CPU_FEATURES", "DISABLE_JIT")):
        return False
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:
        return False
    return all(features.get(name) for name in names)
