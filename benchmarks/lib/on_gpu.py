"""Contenders on a GPU, one after the other: when they begin, eager wall time, device time, peak memory."""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import run
from .cases import Case, Contender, embeddings
from .measure import ONCE, Clock, captured

LONGEST = 4.0  # a call that is expected to take longer is not made
FULL_SVD_BATCH = 256

Row = dict[str, Any]
Work = tuple[Sequence[tuple[int, int, int]], torch.dtype, Sequence[Contender]]
"""Shapes (B, d, k), and who is timed there."""


def parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """That of lib/run.py, with when to end, and when to begin."""
    made = run.parser(doc or "", dry_run="toy sizes on the CPU, kernels interpreted", output=output)
    made.add_argument("--limit", type=float, default=float("inf"), help="seconds, after which no call is begun")
    made.add_argument("--compiled", action="store_true", help="our kernels are in Triton's cache: compile none ahead")
    made.add_argument(
        "--on-cue", type=Path, metavar="FILE",
        help="have rivals compiled until there is such a file; begin when it holds the time to end at (time.time())",
    )  # fmt: skip
    return made


def wait_for(cue: Path, getting_ready: Iterable[Callable[[], object]]) -> float:
    """Makes these calls until the file ``cue`` is there, says by a file beside it that no more is done, and waits for
    the time in it, which it returns by ``time.monotonic()``."""
    for call in getting_ready:
        if cue.exists():
            break
        with contextlib.suppress(Exception):  # it will be met again, and told
            call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    cue.with_suffix(".ready").touch()
    while not (cue.exists() and (told := cue.read_text())):
        time.sleep(0.1)
    return time.monotonic() + float(told) - time.time()


def on_all_cores(prepare: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Calls it for each, in processes of their own, for what they leave in Triton's cache."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(prepare, *job) for job in jobs]
        with run.progress(len(waiting), "compiling") as bar:
            for future in waiting:
                future.exception()  # it will be met again, and told, where that kernel is to be timed
                bar.update()


def measured(contender: Contender, xs: Sequence[Tensor], clock: Clock) -> Row:
    call = functools.partial(contender.step, xs)
    call()
    clock.wait()
    gpu = clock.device == "cuda"
    if gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    once = clock.seconds(call, 1)
    row: Row = {"peak_MiB": (torch.cuda.max_memory_allocated() - before) / 2**20} if gpu else {}
    row["wall_us"] = 1e6 * clock.median(call, once)
    if contender.waits:
        row["no_graph"] = "torch.linalg makes the host wait"
    elif gpu:
        try:
            slow = once > ONCE
            replay = captured(call, 1 if slow else 3)
            row["device_us"] = 1e6 * clock.median(replay, clock.seconds(replay, 1) if slow else None)
        except RuntimeError as error:
            clock.wait()
            row["no_graph"] = str(error).strip().splitlines()[0][:120]
    return row


def times(wanted: Iterable[Work], clock: Clock, deadline: float, order: int = 1) -> Iterator[Row]:
    """``deadline`` by time.monotonic(); ``order``: of the time, in the number of elements."""
    last: dict[str, tuple[float, int]] = {}  # seconds of a contender's last call, and of how many elements that was
    for shapes, dtype, candidates in wanted:
        for B, d, k in shapes:
            xs = embeddings(Case(B, d, k, clock.device), dtype=dtype)
            for contender in candidates:
                name = contender.name
                row: Row = {"B": B, "d": d, "k": k, "dtype": str(dtype).removeprefix("torch."), "contender": name}
                large = contender.largest is not None and (B > FULL_SVD_BATCH or B * d * d > contender.largest)
                seconds, elements = last.get(name, (0.0, 1))
                expected = seconds * max(1.0, (B * d * k / elements) ** order)
                many = k > (contender.most or k)
                if large or many:
                    continue
                if time.monotonic() > deadline:
                    yield row | {"not_run": "no time was left"}
                elif expected > LONGEST:
                    yield row | {"not_run": f"expected to take {expected:.0f} s a call"}
                else:
                    try:
                        row |= measured(contender, xs, clock)
                        last[name] = row["wall_us"] * 1e-6, B * d * k
                    except Exception as error:  # out of memory, a kernel that does not compile: the others go on
                        row["not_run"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
                    yield row
