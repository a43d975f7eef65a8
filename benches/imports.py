"""The study of imports: time from start to the first call."""

import json
import subprocess
import sys

import numpy as np


def imports(*, quick):
    """Time of `import fastattn`, with main names too; modules it must not load."""
    code = (
        "import time; s = time.perf_counter(); import fastattn; "
        "t = time.perf_counter() - s; fastattn.attention, fastattn.Auto; "
        "u = time.perf_counter() - s; import sys, json; "
        "print(json.dumps([t, u, [m for m in ('numba', 'scipy', 'sklearn', 'cupy', "
        "'matplotlib') if m in sys.modules]]))"
    )
    command = [sys.executable, "-c", code]
    found = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(3 if quick else 11)
    ]
    return [
        {
            "milliseconds, median": 1e3 * float(np.median([x[0] for x in found])),
            "with attention and Auto": 1e3 * float(np.median([x[1] for x in found])),
            "least of that": 1e3 * min(x[1] for x in found),
            "heavy modules loaded": found[0][2],
        }
    ]
