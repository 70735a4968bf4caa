"""How time is measured: contenders that take turns, medians; on a GPU by a clock that waits for the device."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

SLOW = 0.3  # seconds; calls that take longer are repeated less
TURN_SECONDS = 0.002  # as long as a contender's turn lasts at least, the call outside the clock apart
LEAST_ROUNDS, MOST_ROUNDS = 7, 300
LEAST_SLOW_ROUNDS = 3

CLOCK_SECONDS = 0.15  # for each number of a Clock
ONCE = 0.2  # seconds; a call that takes longer is timed once there, as one differs little from the next

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


# ------------------------------------------------------------------------------------------------
# In turns
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Of one contender's calls: median and quartiles."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int


def _seconds(call: Call, times: int = 1) -> float:
    """The mean of ``times`` calls, one after the other."""
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    seconds = (time.perf_counter() - start) / times
    del result  # what the last one returns is freed outside the clock, as the others are within
    return seconds


def interleaved(
    calls: Mapping[Name, Call], seconds: float, turn_seconds: float = TURN_SECONDS, seed: int = 0
) -> dict[Name, Timing]:
    """Times calls that take turns, so that a busy moment hits all of them alike.

    A turn is as many calls as fill ``turn_seconds``, after one outside the clock: quick calls are timed as in
    a loop of their own. With 0 it is a single call, right after another contender's: caches are cold then, and
    threads asleep.
    ``seconds`` are shared out equally, so a fast contender has more rounds than a slow one; the rounds of
    each are spread over the whole time, and the order within a round is drawn anew.
    """
    rounds: dict[Name, int] = {}
    length: dict[Name, int] = {}
    warms_up: dict[Name, bool] = {}
    times: dict[Name, list[float]] = {}
    for name, call in calls.items():
        call()  # warms up
        estimate = _seconds(call)
        times[name] = [estimate] if estimate > SLOW else []
        if estimate <= SLOW:
            estimate = min(estimate, _seconds(call), _seconds(call))
        length[name] = max(1, round(turn_seconds / estimate))
        warms_up[name] = turn_seconds > 0 and estimate <= SLOW
        cost = estimate * (length[name] + warms_up[name])
        least = LEAST_SLOW_ROUNDS if estimate > SLOW else LEAST_ROUNDS
        rounds[name] = min(max(int(seconds / len(calls) / cost), least), MOST_ROUNDS)
    total, generator = max(rounds.values()), random.Random(seed)
    for turn in range(total):
        now = [name for name in calls if (turn + 1) * rounds[name] // total > turn * rounds[name] // total]
        generator.shuffle(now)
        for name in now:
            if len(times[name]) < rounds[name]:
                if warms_up[name]:
                    calls[name]()
                times[name].append(_seconds(calls[name], length[name]))
    summary = {}
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        summary[name] = Timing(1e3 * median, 1e3 * low, 1e3 * high, len(samples))
    return summary


# ------------------------------------------------------------------------------------------------
# On a GPU
# ------------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    device: str

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - start) / times

    def median(self, call: Callable[[], Any], once: float | None = None) -> float:
        """Of five rounds that together take about CLOCK_SECONDS; of one call if that takes long, or took: ``once``."""
        if once is None:
            call()
            once = self.seconds(call, 1)
        if once > ONCE:
            return once
        times = max(1, int(CLOCK_SECONDS / 5 / min(once, self.seconds(call, 3))))
        return statistics.median(self.seconds(call, times) for _ in range(5))


def captured(call: Callable[[], Any], before: int = 3) -> Callable[[], None]:
    """A CUDA graph of the call, after so many of them. Raises what capturing raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(before):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
