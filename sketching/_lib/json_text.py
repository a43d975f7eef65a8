"""JSON as the standard has it: no NaN, no infinities, and not too deep.

Python writes and reads them as words that no other parser takes. Here they are strings
of the same letters, which ``float`` reads.
"""

import json
import math
from typing import Any

# objects within objects: whoever writes them again adds a few
_DEEPEST = 64


def parse_object(what: str, text: str | bytes) -> dict[str, Any]:
    """Decode an object; ``what`` names the text in errors."""
    if isinstance(text, str):
        # some editors begin a text with the mark of its encoding
        text = text.removeprefix("\ufeff")
    try:
        found = json.loads(text, parse_constant=str, parse_float=_as_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        level = [x for parent in level for x in _children(parent)]
        if not level:
            return found
    raise ValueError(f"{what} is nested deeper than {_DEEPEST} levels")


def as_text(x: Any) -> str:
    """Encode; NaN and infinities as strings."""
    return json.dumps(_finite(x), allow_nan=False)


def _as_float(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _children(x: Any) -> list[Any]:
    if isinstance(x, dict):
        return list(x.values())
    return x if isinstance(x, list) else []


def _finite(x: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if isinstance(x, float) and not math.isfinite(x):
        return json.dumps(float(x))
    if isinstance(x, dict):
        return {name: _finite(y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(y) for y in x]
    return x
