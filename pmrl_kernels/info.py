"""``python -m pmrl_kernels.info``: versions, devices, which backends work here and why others do not."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends
from .backends import native


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
        ("triton", _version("triton") if importlib.util.find_spec("triton") else "not installed"),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    else:
        lines.append(("cuda", "no device"))
    for name in (*backends.available, *backends.unavailable_reasons):
        reason = backends.unavailable_reasons.get(name)
        lines.append((f"backend {name}", "works" if reason is None else f"not available: {reason}"))
    lines.append(("native library", native.describe()))
    default = backends.default_name
    lines.append(("default", f"{default} (PMRL_KERNELS_BACKEND)" if default else "the fastest that works"))
    sums = os.environ.get("PMRL_KERNELS_SUMS")
    if sums:
        lines.append(("sums on GPUs", f"{sums} (PMRL_KERNELS_SUMS)"))
    width = max(len(label) for label, _ in lines) + 2
    return "\n".join(f"{label:<{width}}{value}" for label, value in lines)


if __name__ == "__main__":
    print(report())
