"""``python -m pmrl_kernels.info``: versions, devices, which backends work here and why others do not."""

from __future__ import annotations

import contextlib
import os
import platform
import sys

import torch

from . import __version__, ops
from .ops import constants


def _triton() -> str:
    """Its version, not importing it."""
    try:
        from .ops import triton

        return (triton.version() or "of unknown version") if triton.installed() else "not installed"
    except Exception as error:  # what is broken is what this report is for
        return f"cannot be told: {error}"


def _backend(name: str) -> str:
    """Whether it works, and for which ops the next one runs."""
    if name not in ops.available:
        return f"not available: {ops.unavailable_reasons[name]}"
    lacking = ops.available[name].lacking
    if not lacking:
        return "works"
    reasons = "; ".join(dict.fromkeys(lacking.values()))
    return f"works; no kernels for {', '.join(lacking)}, which the next one computes ({reasons})"


def _library() -> tuple[str, str]:
    """What was built, for CPUs and for CUDA."""
    try:
        from .ops import native

        return native.describe(), native.describe_cuda()
    except Exception as error:
        return (f"cannot be told: {error}",) * 2


def _lacks(index: int) -> str:
    """Why the library's kernels do not run on a device, if so."""
    try:
        from .ops import native

        reason = native.cuda_unavailable(torch.device("cuda", index))
        return "" if reason is None else f"; not for the native library's kernels: {reason}"
    except Exception as error:
        return f"; whether it runs the native library's kernels cannot be told: {error}"


def _float32_products() -> str:
    """How PyTorch may multiply float32 matrices, which contrasts have it do, and two of the joint scores."""
    on_cpus = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    told = {"CPUs": on_cpus, "GPUs": torch.backends.cuda.matmul.fp32_precision}
    reduced = ", ".join(f"{how} on {where}" for where, how in told.items() if how not in ("none", "ieee"))
    less = "where contrasts are less exact, and joint scores by cosine and mip (docs/contract.md)"
    return f"may be in {reduced}, {less}" if reduced else "in float32"


def _asked(name: str, variable: str, wanted: tuple[str, ...]) -> str:
    """What the environment asks for, which only a call would refuse."""
    told = f"{name} ({variable})"
    return told if name in wanted else f"{told}, unknown: wanted one of {', '.join(map(repr, wanted))}"


def report() -> str:
    """The report as text, one fact a line.

    Example:
        >>> print(report().splitlines()[0])  # doctest: +ELLIPSIS
        pmrl_kernels   ...
    """
    lines = [
        ("pmrl_kernels", __version__),
        ("python", f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}"),
        (
            "torch",
            f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})",
        ),
        ("triton", _triton()),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("float32 products", _float32_products()),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            told = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{_lacks(index)}"
            lines.append((f"cuda:{index}", told))
    else:
        lines.append(("cuda", "no device"))
    names = (*ops.available, *ops.unavailable_reasons)
    for name in names:
        lines.append((f"backend {name}", _backend(name)))
    lines += zip(("native library", "kernels for CUDA"), _library(), strict=True)
    default = "the fastest that works"
    if ops.default_name is not None:
        default = _asked(ops.default_name, "PMRL_KERNELS_BACKEND", names)
        reason = ops.unavailable_reasons.get(ops.default_name)
        default += "" if reason is None else f", not available: {reason}"
    lines.append(("default", default))
    sums = os.environ.get("PMRL_KERNELS_SUMS")
    if sums:
        lines.append(("sums on GPUs", _asked(sums, "PMRL_KERNELS_SUMS", constants.SUMS)))
    width = max(len(label) for label, _ in lines) + 2
    return "\n".join(f"{label:<{width}}{value}" for label, value in lines)


def main() -> None:
    """Prints the report as far as there is something that takes it."""
    if sys.stdout is None:  # a program without a console
        return
    printable = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = report().encode(printable, "replace").decode(printable)  # a compiler's quotes are not in every locale
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read it has read enough
        # What is left in the buffer would be tried again when the interpreter ends, and complained about.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
