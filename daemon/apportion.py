"""Dividing whole microjoules: the largest-remainder method, exact in integers.

Every joule that is divided anywhere (counter over samples, window over queries) goes through here, so conservation is
proved in one place.
"""

import math
from collections.abc import Sequence

_SCALE = 1 << 40
"""Weights are divided by their maximum, multiplied by this and rounded: 12 decimal digits survive."""


def scaled(weights: Sequence[float]) -> tuple[list[int], int]:
    """Weights as integers, the largest of them 2^40, at least 1 for any weight > 0; and how many were NaN or infinite.

    NaN, infinities and negative weights count as 0 and are counted, so one broken figure never poisons its neighbours.
    """
    broken = sum(1 for w in weights if not math.isfinite(w) or w < 0)
    clean = [w if math.isfinite(w) and w > 0 else 0.0 for w in weights]
    top = max(clean, default=0.0)
    if top == 0.0:
        return [0] * len(clean), broken
    return [max(1, round(w / top * _SCALE)) if w > 0 else 0 for w in clean], broken


def apportion(total: int, weights: Sequence[int], keys: Sequence[str] | None = None) -> list[int]:
    """Parts of `total` ≥ 0 proportional to the integer `weights` ≥ 0; they sum to `total` exactly.

    What the rounding down leaves over goes one each to the largest remainders; ties go to the smaller key (or the
    earlier place, without keys). Raises ValueError if `total` > 0 and all weights are 0: the caller must book it.
    """
    whole = sum(weights)
    if whole == 0:
        if total:
            raise ValueError(f"{total} µJ cannot be divided over weights that are all 0")
        return [0] * len(weights)
    parts, remainders = [], []
    for weight in weights:
        part, remainder = divmod(total * weight, whole)
        parts.append(part)
        remainders.append(remainder)
    left = total - sum(parts)
    if left:
        order = sorted(range(len(parts)), key=lambda i: (-remainders[i], keys[i] if keys else i))
        for i in order[:left]:
            parts[i] += 1
    return parts
