"""PMRL at a batch whose activations do not fit: three encoders in chunks.

    python examples/integrations/gradcache.py                  1024 rows in chunks of 64, within 64 MiB
    python examples/integrations/gradcache.py --chunk 1024     the same without chunks: out of memory

What differs from a run without chunks: ``Chunked(encoder, 64)`` around each encoder. The loss, ``backward()`` and the
optimiser are as ever. So that a small model runs out of memory too, this process may take ``--memory`` MiB beyond what
it has before the first step (Linux).
"""

import argparse
import ctypes
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from synthetic import HELD_OUT, HELD_OUT_SEED, WIDTHS, Encoder, Run, scores, views
from torch import Tensor, nn
from tqdm import tqdm

from pmrl_kernels import Chunked, PMRLLoss

HIDDEN = 4096


def allow(mebibytes: int) -> None:
    """No more memory than so much beyond what this process has. What is freed goes back at once, as if nothing else had
    been there before (an allocator keeps it, in pieces)."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    status = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) for line in status if line.startswith("VmData:")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + (mebibytes << 20), resource.RLIM_INFINITY))


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--memory", type=int, default=64, help="MiB; 0 for no limit")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    encoders = nn.ModuleDict({name: Chunked(Encoder(width, HIDDEN), options.chunk) for name, width in WIDTHS.items()})
    loss = PMRLLoss(1.0, contrast="leave_one_out", learnable_instance_temperature=True)
    optimizer = torch.optim.Adam([*encoders.parameters(), *loss.parameters()], 2e-3)

    def embed(features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: encoder(features[name]) for name, encoder in encoders.items()}

    loss(embed(views(8, seed=1))).backward()  # libraries and threads take their memory at the first call
    before = scores(lambda: embed(views(HELD_OUT, HELD_OUT_SEED)))
    if options.memory:
        allow(options.memory)
    progress = tqdm(range(options.steps))
    for step in progress:
        value = loss(embed(views(options.batch, seed=2 * step)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{value.item():.3f}")
    run = Run(before, scores(lambda: embed(views(HELD_OUT, HELD_OUT_SEED))))
    print(run)
    return run


if __name__ == "__main__":
    main()
