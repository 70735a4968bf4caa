"""What an installed wheel must do where there is nothing but torch: no checkout, no compiler, no test packages.

    python -I smoke.py

checks the native backend against the reference, on every instruction set that was compiled and this processor has, and
that what goes wrong in the library arrives here as an exception. tests/packaging and release.py run it in environments
of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig

import torch

import pmrl_kernels
from pmrl_kernels import dominant_singular_triplet, info, ops, pmrl_loss
from pmrl_kernels.ops import native

# Of the largest entry. Not the suite's tolerances: this is to find a library that computes something else.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float64: 1e-10}


def results(backend: str, dtype: torch.dtype, k: int) -> list[torch.Tensor]:
    """A loss of both terms, a triplet, and their gradients."""
    generator = torch.Generator().manual_seed(k)
    shared = torch.randn(21, 37, generator=generator)
    xs = [(shared + torch.randn(21, 37, generator=generator)).to(dtype).requires_grad_() for _ in range(k)]
    mask = torch.rand(21, k, generator=generator) > 0.3 if k % 2 else None
    loss = pmrl_loss(xs, mask=mask, contrast="modality", temperature=0.5, backend=backend)
    sigma, u, v = dominant_singular_triplet(xs, mask=mask, backend=backend)
    total = loss + sigma.sum() + (u * torch.linspace(-1, 1, 37)).sum() + (v * torch.linspace(1, 2, k)).sum()
    return [loss.detach(), sigma.detach(), u.detach(), v.detach(), *torch.autograd.grad(total, xs)]


def check() -> None:
    for dtype, tolerance in TOLERANCES.items():
        for k in (2, 3, 5, 8, 9):
            pairs = zip(results("native", dtype, k), results("reference", dtype, k), strict=True)
            for position, (found, expected) in enumerate(pairs):
                assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
                error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
                if not error <= tolerance:
                    sys.exit(f"{dtype}, k = {k}, result {position}: wanted an error of {tolerance}, got {error}")


def check_errors() -> None:
    """Exceptions cross the library's border, by way of PyTorch's stable ABI, and the process goes on.

    One that the library throws itself, one that its C++ runtime throws for want of memory, and one that PyTorch throws
    on its behalf, which arrives as a code and is thrown again.
    """
    calls = torch.ops.pmrl_kernels
    x, options = torch.ones(2, 3), (None, None, 0.5, True, True, 1)
    endless = torch.ones(1, 1).expand(2**62, 1)
    for call, told in {
        lambda: calls.spectral_forward([x, torch.ones(3, 2)], *options): "embeddings must have equal shapes (B, d)",
        lambda: calls.spectral_forward([torch.ones(2, 33, 3)], *options): "k must be in 1..32, got 33",
        lambda: calls.paired_forward([endless], [0, 0], [True], None, [], None, 0, None, 0.5): "bad_alloc",
        lambda: calls.spectral_forward([endless, endless], *options): "out of memory",
    }.items():
        try:
            call()
        except (RuntimeError, MemoryError) as error:
            if told not in str(error):
                sys.exit(f"wanted an error that says {told!r}, got {error!r}")
        else:
            sys.exit(f"wanted an error that says {told!r}, got none")
    check()


def main() -> None:
    installed = os.path.realpath(sysconfig.get_path("platlib"))
    if not os.path.realpath(pmrl_kernels.__file__).startswith(installed + os.sep):
        sys.exit(f"wanted pmrl_kernels in {installed}, got {pmrl_kernels.__file__}")
    if "native" not in ops.available:
        sys.exit(f"wanted the native backend, got: {ops.unavailable_reasons['native']}")
    asked = os.environ.get("PMRL_KERNELS_ISA")
    if asked:
        assert native.build_info["isa"] == asked, (native.build_info["isa"], asked)
        check()
        print(f"{asked}: agrees with the reference")
        return
    print(info.report(), flush=True)
    check_errors()
    print("errors arrive as exceptions", flush=True)
    for isa in native.build_info["compiled"].split():
        if isa.endswith("(-)"):
            print(f"{isa[:-3]}: this processor does not have it")
            continue
        subprocess.run([sys.executable, "-I", __file__], env={**os.environ, "PMRL_KERNELS_ISA": isa}, check=True)


if __name__ == "__main__":
    main()
