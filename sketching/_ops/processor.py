"""What code is compiled for, asked from outside of the kernels."""


def compiles_for(name: str) -> bool:
    """Whether kernels are compiled for a processor with this feature of LLVM's."""
    # numba is loaded by who asks, not by who may
    from sketching._ops.cpu.features import has

    known: bool = has(name)
    return known
