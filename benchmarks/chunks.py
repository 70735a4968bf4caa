"""Encoders in chunks: memory, time and gradients of a step, by the number of chunks.

    python benchmarks/chunks.py

Three transformers (2 layers of width 64 over 16 tokens) read a batch of 512; the loss is `dominant_sv_loss`, which
takes next to nothing itself. Memory is what PyTorch's CPU allocator has handed out at the peak of forward and backward,
beyond parameters and inputs, gradients included; time the median of runs that take turns; errors the norm of the
difference from the gradient in one piece, relative, in float32, and under autocast from the gradient in float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pmrl_kernels import dominant_sv_loss, in_chunks

TOKENS, WIDTH = 16, 64
CHUNKS = (1, 2, 8, 32)


def peak(step: Callable[[], object]) -> float:
    """MiB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[int, float]:
    """The peak in MiB, by number of chunks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=512)
    options = parser.parse_args(arguments)
    B = options.batch
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    encoders = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for _ in range(3)]
    parameters = [p for encoder in encoders for p in encoder.parameters()]
    views = [torch.randn(B, TOKENS, WIDTH) for _ in encoders]

    def step_in(chunks: int) -> Callable[[], Tensor]:
        def step() -> Tensor:
            # Of an encoder's output the mean alone, or the tokens of all rows would be kept.
            calls = [in_chunks(lambda x, of=encoder: of(x).mean(1), B // chunks) for encoder in encoders]
            loss = dominant_sv_loss([call(x) for call, x in zip(calls, views, strict=True)], temperature=1.0)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

        return step

    steps = {chunks: step_in(chunks) for chunks in CHUNKS}
    exact = steps[1]()
    times: dict[int, list[float]] = {chunks: [] for chunks in CHUNKS}
    for _ in range(options.repeats):
        for chunks, step in steps.items():
            times[chunks].append(seconds(step))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, B = {B}")
    print("| chunks | peak, MiB | time, ms | of one piece's | error, float32 | error, bfloat16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    peaks = {chunks: peak(step) for chunks, step in steps.items()}
    for chunks, step in steps.items():
        with torch.autocast("cpu", torch.bfloat16):
            half = step()
        errors = [float((found - exact).norm() / exact.norm()) for found in (step(), half)]
        ms, least = (1000 * statistics.median(times[of]) for of in (chunks, 1))
        print(f"| {chunks} | {peaks[chunks]:.1f} | {ms:.0f} | {ms / least:.2f} | {errors[0]:.1e} | {errors[1]:.1e} |")
    return peaks


if __name__ == "__main__":
    main()
