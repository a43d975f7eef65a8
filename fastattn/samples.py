"""Real attention inputs that come with the package."""

from importlib import resources

import numpy as np

from sketching._lib.arrays import Array


def sample_names() -> list[str]:
    """Return the names of the packaged samples.

    Returns
    -------
    list of str
        In alphabetical order; each is a name for :func:`load_sample`.

    Examples
    --------
    >>> from fastattn import sample_names
    >>> sample_names()
    ['minilm-diffuse', 'minilm-mixed', 'minilm-sharp']
    """
    folder = resources.files("fastattn") / "data"
    files = [entry.name for entry in folder.iterdir() if entry.name.endswith(".npz")]
    return sorted(name.removesuffix(".npz").replace("_", "-") for name in files)


def load_sample(name: str) -> tuple[Array, Array, Array]:
    """Load real query, key and value of a few heads, as float32.

    The inputs of softmax attention in all-MiniLM-L6-v2 on Python sources; queries are
    not scaled. ``minilm-diffuse``: rows attend to hundreds of keys; ``minilm-sharp``:
    peaked attention, to tens of keys; ``minilm-mixed``: all heads of one layer, short.

    Parameters
    ----------
    name : str
        One of :func:`sample_names`.

    Returns
    -------
    query, key, value : array, shape (heads, n, d)

    Raises
    ------
    ValueError
        If there is no sample of that name.

    Examples
    --------
    >>> from fastattn import load_sample
    >>> query, key, value = load_sample("minilm-sharp")
    >>> query.shape
    (2, 2048, 32)
    """
    if name not in sample_names():
        raise ValueError(f"name: expected one of {sample_names()}, got {name!r}")
    path = resources.files("fastattn") / "data" / f"{name.replace('-', '_')}.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        query, key, value = (arrays[x].astype(np.float32) for x in "QKV")
    return query, key, value
