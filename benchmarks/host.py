"""What the host spends on a small call, forward + backward, in microseconds: four embeddings (8, 16) on a CPU.

    python benchmarks/host.py                     # both sections, some ten seconds
    python benchmarks/host.py --sections native   # the native backend, part by part
    python benchmarks/host.py --output FOLDER     # host.json too

*native*: where the time of a call goes. *Operators* are the native operators alone, with the arguments that the call
gives them. *Empty Function* is a ``torch.autograd.Function`` with as many inputs and outputs, which computes and saves
nothing: what PyTorch takes for differentiating at all. *Both in one* is what that Function takes beyond the two once it
calls the operators: each runs slower where the other has been in the processor's caches. The rest is *ours*, the whole
less the Function that calls the operators: in the forward pass reading arguments, choosing a backend and saving, in the
backward pass what comes before and after the operators. Lower quartiles stand beside the medians, since they hold out
longer where other processes want the processor too.

*triton*: the Python path up to the launch, without a GPU. A call goes through everything that it goes through on a
GPU, arguments, autograd, allocations and the choice of kernels, except that the compiled kernel at its end does
nothing. Beside it F.mse_loss on the same tensors and the native backend, whose times contain their arithmetic, and
where there is a C++ compiler the CUDA backend up to its launches, which are calls of a driver that does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # so that Triton's backend takes tensors on a CPU; nothing is interpreted

import torch
from lib import cases, measure, report, run
from lib.report import number, table
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import mse_loss

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, instance_contrastive_loss, ops, pmrl_loss
from pmrl_kernels.ops import objective
from pmrl_kernels.ops.operators import Pair

SECONDS = 4.0  # for each section

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------
# The native backend, part by part
# ------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A public function, and the form of its autograd Function."""

    loss: Callable[..., Tensor]
    others: int
    """Inputs of the Function beside the embeddings: settings, mask, temperatures."""
    outputs: int


MEASURED = {
    "dominant_sv_loss": Measured(dominant_sv_loss, others=3, outputs=1),
    "pmrl_loss": Measured(pmrl_loss, others=4, outputs=3),
}


class Recorded(NamedTuple):
    """An operator as a call has called it."""

    name: str
    operator: Callable[..., Any]
    arguments: tuple[Any, ...]


def recorded(call: Callable[[], object]) -> list[Recorded]:
    """The native operators that a call calls, in order."""
    found: list[Recorded] = []

    def recording(name: str, operator: Callable[..., Any], *arguments: Any) -> Any:
        found.append(Recorded(name, operator, arguments))
        return operator(*arguments)

    def both(name: str, pair: Pair) -> Pair:
        forward = functools.partial(recording, f"{name}_forward", pair.forward)
        return pair._replace(forward=forward, backward=functools.partial(recording, f"{name}_backward", pair.backward))

    native, resolved = ops.available["native"], ops._resolved
    recorder = native._replace(pairs={name: both(name, pair) for name, pair in native.pairs.items()})
    try:
        ops.available["native"], ops._resolved = recorder, {}
        call()
    finally:
        ops.available["native"], ops._resolved = native, resolved
    return found


def run_all(operators: Sequence[Recorded]) -> None:
    for _, operator, arguments in operators:
        operator(*arguments)


def function_around(
    forward_operators: Sequence[Recorded],
    backward_operators: Sequence[Recorded],
    xs: Sequence[Tensor],
    measured: Measured,
) -> Callable[[], Tensor]:
    """A call of a Function that runs these with arguments that are ready, and returns tensors that are, both ways."""
    outputs = tuple(torch.zeros(()) for _ in range(measured.outputs))
    gradients = (*(None for _ in range(measured.others)), *(torch.zeros_like(x) for x in xs))

    class Around(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            run_all(forward_operators)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            run_all(backward_operators)
            return gradients

    others = (object(), *(None for _ in range(measured.others - 1)))
    return lambda: Around.apply(*others, *xs)[0]


def part_calls(measured: Measured) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    xs = cases.embeddings(cases.OVERHEAD)

    def forward() -> Tensor:
        return measured.loss(*xs, backend="native")

    def differentiated(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), xs)

    forward_operators = recorded(forward)
    all_operators = recorded(differentiated(forward))
    backward_operators = all_operators[len(forward_operators) :]

    def operators() -> None:
        with torch.no_grad():
            run_all(all_operators)

    around = function_around(forward_operators, backward_operators, xs, measured)
    return {
        "whole": differentiated(forward),
        "whole, forward": forward,
        "operators": operators,
        "empty Function": differentiated(function_around((), (), xs, measured)),
        "Function around operators": differentiated(around),
        "Function around operators, forward": around,
    }


def parts(us: Mapping[str, float]) -> dict[str, float]:
    """What the times of the calls say."""
    around = us["Function around operators"]
    ours_forward = us["whole, forward"] - us["Function around operators, forward"]
    return {
        "whole": us["whole"],
        "operators": us["operators"],
        "empty Function": us["empty Function"],
        "both in one": around - us["operators"] - us["empty Function"],
        "ours": us["whole"] - around,
        "ours, forward": ours_forward,
        "ours, backward": us["whole"] - around - ours_forward,
    }


def part_rows(seconds: float) -> list[Row]:
    """For each function: microseconds by part, of medians and of lower quartiles, and the times they come from."""
    calls = {(name, part): call for name, m in MEASURED.items() for part, call in part_calls(m).items()}
    timings = measure.interleaved(calls, seconds)
    rows = []
    for name in MEASURED:
        found = {part: timing for (of, part), timing in timings.items() if of == name}
        for statistic, ms in (("median", "median_ms"), ("lower quartile", "low_ms")):
            us = {part: 1e3 * getattr(timing, ms) for part, timing in found.items()}
            rows.append({"function": name, "statistic": statistic, "parts": parts(us), "times": us})
    return rows


def parts_text(rows: Sequence[Row]) -> str:
    header = ["", *(f"{row['function']}, {row['statistic']}" for row in rows)]
    body = [[part, *(number(row["parts"][part]) for row in rows)] for part in rows[0]["parts"]]
    return table(header, body)


# ------------------------------------------------------------------------------------------------
# Triton's backend up to the launch
# ------------------------------------------------------------------------------------------------

launches = 0


class Nothing:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run

    def run(self, *arguments: Any, stream: int) -> None:
        global launches
        launches += 1


def without_a_gpu() -> None:
    from pmrl_kernels.ops.triton import runtime

    runtime.INTERPRETED = False
    objective.waits_for_launches = lambda x, k: True
    runtime.compile_for = lambda *_: Nothing()
    runtime.triton.runtime.driver = _Driver
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda index: 0


class _Driver:
    class active:  # noqa: N801
        get_current_target = staticmethod(lambda: None)


def cuda_without_a_gpu(xs: Sequence[Tensor]) -> int | None:
    """The host's half of csrc/cuda for tensors of a CPU, as the backend "cuda". Returns how many launches a call takes,
    or None where there is no C++ compiler."""
    sys.path.insert(0, str(run.BENCHMARKS.parent))
    from tests.tools.installation import COMPILER

    if not COMPILER:
        return None
    os.environ["PMRL_DOOR_FLAGS"] = "-O2 -UPMRL_TUNING"
    from tests.tools import cuda_door as cuda

    door = cuda.door(runs=False)

    def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
        return None

    operators = door.operators
    both = operators.spectral_forward.default, operators.spectral_backward.default
    pairs = {"spectral": Pair("cuda", *both, rejects)}
    ops.available["cuda"] = ops.Backend("cuda", rejects, pairs, {})
    loss("cuda")(xs)
    door.driver.on_launch(ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p))  # takes any arguments, does nothing
    return len(door.launches)


def loss(backend: str) -> Callable[[Sequence[Tensor]], Any]:
    return lambda xs: torch.autograd.grad(dominant_sv_loss(*xs, backend=backend), xs)


def triplet(xs: Sequence[Tensor]) -> Any:
    sigma, u, _ = dominant_singular_triplet(*xs, backend="triton")
    return torch.autograd.grad((sigma, u), xs, (torch.ones_like(sigma), torch.ones_like(u)))


def _differentiated(loss: Tensor, xs: Sequence[Tensor]) -> Any:
    return torch.autograd.grad(loss, xs)


def _pmrl(xs: Sequence[Tensor], contrast: str) -> Tensor:
    return pmrl_loss(*xs, contrast=contrast, backend="triton")


CALLS = {
    "alignment, triton": loss("triton"),
    "the same, forward alone": lambda xs: dominant_sv_loss(*[x.detach() for x in xs], backend="triton"),
    "triplet, triton": triplet,
    "instance contrast, triton": lambda xs: _differentiated(instance_contrastive_loss(xs[0], backend="triton"), xs[:1]),
    "pmrl, leave_one_out, triton": lambda xs: _differentiated(_pmrl(xs, "leave_one_out"), xs),
    **({"alignment, native": loss("native")} if "native" in ops.available else {}),
    "F.mse_loss": lambda xs: torch.autograd.grad(mse_loss(xs[0], xs[1]), xs[:2]),
}


def launch_rows(seconds: float) -> list[Row]:
    without_a_gpu()
    xs, counts, calls = cases.embeddings(cases.OVERHEAD), {}, dict(CALLS)
    for name, call in calls.items():
        call(xs)
        before = launches
        call(xs)
        counts[name] = launches - before
    if of_cuda := cuda_without_a_gpu(xs):
        calls["alignment, cuda"], counts["alignment, cuda"] = loss("cuda"), of_cuda
    timings = measure.interleaved({name: functools.partial(call, xs) for name, call in calls.items()}, seconds)
    return [
        {"call": name, "median": 1e3 * t.median_ms, "low": 1e3 * t.low_ms, "launches": counts[name]}
        for name, t in timings.items()
    ]


def launches_text(rows: Sequence[Row]) -> str:
    body = [[row["call"], number(row["median"]), number(row["low"]), str(row["launches"])] for row in rows]
    return table(["", "median", "lower quartile", "launches"], body)


# By backend: what is measured, and how it is told. Triton's comes last, since it changes PyTorch for good.
SECTIONS = {"native": (part_rows, parts_text), "triton": (launch_rows, launches_text)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = run.parser(__doc__, quick="a tenth of the time", output="folder for host.json")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args(argv)
    results: dict[str, Any] = {"conditions": run.on_a_cpu(force=True)}
    print(f"forward + backward at {cases.OVERHEAD}, torch {torch.__version__}, one process, µs a call")
    for name, (rows, text) in SECTIONS.items():
        if name not in options.sections:
            continue
        if name not in ops.available:
            print(f"\n{name}: not here, {ops.unavailable_reasons.get(name)}")
            continue
        results[name] = rows(SECONDS / (10 if options.quick else 1))
        print(f"\n{name}\n{text(results[name])}")
    print("\n".join(["", *report.warning(results["conditions"])]))
    if options.output:
        run.write_json(results, options.output / "host.json")
    return results


if __name__ == "__main__":
    main()
