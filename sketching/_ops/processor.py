"""Properties of the processor that kernels are compiled for."""


def compiles_for(name: str) -> bool:
    """Whether kernels are compiled for a processor with this feature of LLVM's."""
    # numba is loaded by the call, not by the import
    from sketching._ops.cpu.features import has

    known: bool = has(name)
    return known
