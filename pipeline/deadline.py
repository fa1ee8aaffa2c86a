"""Deadlines: points on the monotonic clock by which an operation must have ended."""

from __future__ import annotations

import time


def compute_time_left(deadline: float) -> float:
    """Return the seconds until a deadline of `time.monotonic()`. Raises TimeoutError when there are none left."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
