"""What the commands that answer share: the names of methods, and numbers as JSON has them."""

from __future__ import annotations

import math
from typing import Any

METHOD_NAMES = {
    "naive": "counted at alpha 0",
    "pooled": "all alphas, weighted back to 0",
    "path": "extrapolated along alpha",
}


def without_nan(value: Any) -> Any:
    """The same with null for every number that JSON has not."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
