"""Seconds of calls, without torch: the process that runs OpenVINO imports this too."""

from __future__ import annotations

import time
from collections.abc import Callable


def turn(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call behind the first, which warms up; at least three."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
