"""csrc/cuda/driver.cpp: why no kernel runs, what is loaded and when, what a launch hands on; without a card."""

from __future__ import annotations

import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.tools import driver
from tests.tools.kept import kept


@pytest.fixture(scope="module")
def folder() -> Path:
    return kept("driver", driver.compile_libraries)


CARD = "cuda(capabilities=[{}] * 8, driver_version={}); pytorch(); print(door().door_unavailable(0).decode())"
REASONS = {
    "no kernels": (
        "print(door('empty.so').door_unavailable(-1).decode())",
        "this library was built without kernels for CUDA: nobody compiled any",
    ),
    "a torch for CPUs": ("print(door().door_unavailable(-1).decode())", "PyTorch was built without CUDA"),
    "a torch for HIP": (
        "cuda(); pytorch(); pytorch('libtorch_hip.so'); print(door().door_unavailable(-1).decode())",
        "PyTorch was built for HIP, and these kernels for CUDA",
    ),
    "a torch without streams": (
        "cuda(); pytorch('old/libtorch_cuda.so'); print(door().door_unavailable(-1).decode())",
        "PyTorch does not tell its streams: it has no aoti_torch_get_current_cuda_stream",
    ),
    "an old driver": (
        "load('old/libcuda.so.1'); pytorch(); print(door().door_unavailable(-1).decode())",
        "the CUDA driver is too old: wanted one of CUDA 12.0 or newer, this has no cuInit",
    ),
    "a driver that does not start": (
        "cuda(failing='cuInit'); pytorch(); print(door().door_unavailable(-1).decode())",
        "CUDA cannot be started: an error of the rehearsal's driver",
    ),
    "no such device": (
        "cuda(devices=1); pytorch(); print(door().door_unavailable(1).decode())",
        "cuda:1 cannot be asked for its properties: an error of the rehearsal's driver",
    ),
    "an old card": (
        CARD.format(80, 13000),
        "this library has no code for compute capability 8.0, its kernels are for sm_86 sm_90 compute_90",
    ),
    "a card whose float64 is slow, code whose is fast": (
        CARD.format(103, 13000),
        "float64 is slow on compute capability 10.3, and what this library has for it, compiled for 9.0, sums in "
        "float64",
    ),
    "a driver older than the PTX": (
        CARD.format(120, 12060),
        "the CUDA driver is too old: it is of CUDA 12.6, and for compute capability 12.0 nvcc 13.0.88, ptxas 12.9.86 "
        "compiled for drivers of CUDA 12.8 or newer",
    ),
    "a driver older than the objects": (
        CARD.format(90, 11080),
        "the CUDA driver is too old: it is of CUDA 11.8, and for compute capability 9.0 nvcc 13.0.88, ptxas 12.9.86 "
        "compiled for drivers of CUDA 12.0 or newer",
    ),
}


@pytest.mark.parametrize(("code", "reason"), REASONS.values(), ids=REASONS.keys())
def test_why_no_kernel_runs(folder, code, reason):
    assert driver.run(folder, code) == [reason]


def test_no_driver_at_all(folder):
    """In the loader's own words."""
    if ctypes.util.find_library("cuda") is not None:
        pytest.skip("this machine has a CUDA driver")
    (reason,) = driver.run(folder, "pytorch(); print(door().door_unavailable(-1).decode())")
    assert re.fullmatch(r"there is no CUDA driver: libcuda\.so\.1: .+", reason)


@pytest.mark.parametrize(("capability", "runs"), [(86, 86), (87, 86), (89, 86), (90, 90), (100, 90)])
def test_cards_that_there_is_code_for(folder, capability, runs):
    """Of that number or a lower one of its generation; else by the PTX, where the card is newer than that."""
    code = f"""
cuda(capabilities=[{capability}] * 8, driver_version=12080, multiprocessors=77)
pytorch()
d = door()
found = (c_int * 3)()
print(d.door_unavailable(0), d.door_properties(0, found), *found)
"""
    assert driver.run(folder, code) == [f"None None 77 {capability} {runs}"]


def test_what_is_called_for_a_reason_raises_it(folder):
    code = """
cuda(capabilities=[90, 75] + [90] * 6)
pytorch()
d = door()
found = (c_int * 3)()
print(d.door_properties(1, found).decode())
print(d.door_launch(1, kernel(d, 4, "forward"), 1, 128, 0, None, 0, 0.0).decode())
print(d.door_launch(999, kernel(d, 4, "forward"), 1, 128, 0, None, 0, 0.0).decode())
"""
    *lines, last = driver.run(folder, code)
    assert len(lines) == 2
    for line in lines:
        assert line.endswith("pmrl_kernels: this library has no code for compute capability 7.5, its kernels are for "
                             "sm_86 sm_90 compute_90")  # fmt: skip
    assert last.endswith("pmrl_kernels: device must be in 0..127, got 999")


LAUNCH = """
library = cuda()
pytorch()
d = door()
seen = []

@Launched
def launched(function, grid, arguments):
    at, context = grid.contents, c_void_p()
    library.cuCtxGetCurrent(byref(context))
    first, second = c_int.from_address(arguments[0]).value, c_double.from_address(arguments[1]).value
    third = (c_double * 3).from_address(arguments[2])[:], c_int.from_address(arguments[2] + 24).value
    shape = (at.X, at.Y, at.Z, at.x, at.y, at.z, at.shared, at.stream)
    seen.append((library.name_of(function).decode(), shape, context.value, first, second, third))

library.on_launch(launched)
"""


def launching(folder: Path, code: str) -> list[str]:
    return driver.run(folder, LAUNCH + code)


def test_a_launch_hands_on_grid_stream_context_and_arguments(folder):
    code = """
for device in (0, 3):
    stream = c_void_p()
    assert d.door_stream(device, byref(stream)) is None
    assert d.door_launch(device, kernel(d, 4, f"forward_{device}"), 70 + device, 128, 512, stream, 37, 0.25) is None
assert d.door_launch(0, kernel(d, 4, "forward_0"), 0, 128, 0, None, 37, 0.25) is None
for one in seen:
    print(one)
"""
    third = ([1.0, 2.0, 0.25], 37)
    assert launching(folder, code) == [
        str((f"forward_{n}", (70 + n, 1, 1, 128, 1, 1, 512, driver.STREAM + n), n + 1, 37, 0.25, third)) for n in (0, 3)
    ]  # and none of no blocks


def test_the_context_of_a_thread(folder):
    """A device's is retained once; a fresh thread gets it, as of the CUDA runtime; another device's comes back."""
    code = """
import threading

def context():
    found = c_void_p()
    library.cuCtxGetCurrent(byref(found))
    return found.value

def work(device):
    before = context()
    assert d.door_launch(device, kernel(d, 2, "backward"), 1, 32, 0, None, 0, 0.0) is None
    print(device, before, seen[-1][2], context())

for device in (1, 1, 2):
    thread = threading.Thread(target=work, args=(device,))
    thread.start()
    thread.join()
library.cuCtxSetCurrent(c_void_p(6))
work(1)
assert d.door_launch(4, kernel(d, 2, "backward"), 1, 32, 0, None, 0, 0.0) is None
print(context(), calls(library).count("cuDevicePrimaryCtxRetain"))
"""
    assert launching(folder, code) == ["1 None 2 2", "1 None 2 2", "2 None 3 3", "1 6 2 6", "6 3"]


def test_images_and_kernels_are_loaded_once_and_on_first_use(folder):
    """By whichever of several threads; in each device's context; as if no stream was captured."""
    code = """
import threading

assert d.door_unavailable(0) is None
print(*calls(library))
found = []
def ask():
    found.append(kernel(d, 4, "forward").value)
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 8 and len(set(found)) == 1
for _ in range(3):
    for device in (0, 1):
        for shared in (1000, 40000, 60000, 50000):
            assert d.door_launch(device, kernel(d, 4, "forward"), 1, 32, shared, None, 0, 0.0) is None
told = calls(library)
names = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "shared", "launch")
print({name: told.count(name) for name in names})
print(library.image_of(1) == d.code_of(1), c_int.in_dll(library, "capture_mode").value)
"""
    counts = {"cuLibraryLoadData": 1, "cuLibraryGetKernel": 1, "cuKernelGetFunction": 2, "shared": 6, "launch": 24}
    assert launching(folder, code) == ["cuInit cuDeviceGet", str(counts), "True 0"]


def test_a_kernel_that_is_not_there(folder):
    code = """
found = c_void_p()
for k, name in ((4, b"no_such_thing"), (3, b"forward")):
    print(d.door_kernel(k, name, None, byref(found)).decode())
print(calls(library).count("cuLibraryLoadData"))
"""
    *lines, loaded = launching(folder, code)
    assert [line.rpartition("pmrl_kernels: ")[2] for line in lines] == [
        "no kernel no_such_thing for k = 4",
        "no kernel forward for k = 3",
    ]
    assert loaded == "2"  # both images for k = 4 were asked


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ("cuLibraryLoadData", "the kernels for k = 2"),
        ("cuLibraryGetKernel", "kernel forward"),
        ("cuKernelGetFunction", "loading forward"),
        ("cuDevicePrimaryCtxRetain", "a device cannot be started"),
        ("shared", "shared memory of forward"),
        ("launch", "launching forward"),
    ],
)
def test_errors_tell_the_drivers_text_and_pass(folder, failing, told):
    """What failed is tried again by the next call."""
    code = f"""
def all_of_it():
    found = c_void_p()
    return d.door_kernel(2, b"forward", None, byref(found)) or d.door_launch(0, found, 1, 32, 60000, None, 0, 0.0)

failing = (ctypes.c_char * 64).in_dll(library, "failing")
failing.value = {failing!r}.encode()
print(all_of_it().decode())
failing.value = b""
print(all_of_it(), c_int.in_dll(library, "capture_mode").value)
"""
    first, second = launching(folder, code)
    assert first.endswith(f"pmrl_kernels: {told}: an error of the rehearsal's driver")
    assert second == "None 0"


def test_nothing_is_loaded_while_a_graph_is_captured(folder):
    """Neither an image nor into a device's context; what is there runs. The default stream cannot be captured."""
    code = """
def kernel_and_launch(device, name):
    found, stream = c_void_p(), c_void_p(STREAM)
    told = d.door_kernel(4, name, stream, byref(found)) or d.door_launch(device, found, 1, 32, 0, stream, 0, 0.0)
    return told and told.decode().rpartition("pmrl_kernels: ")[2].partition(";")[0]

capturing = c_int.in_dll(library, "capturing")
capturing.value = 1
print(kernel_and_launch(0, b"forward"), calls(library).count("cuLibraryLoadData"))
capturing.value = 0
print(kernel_and_launch(0, b"forward"))
capturing.value = 1
for device, name in ((0, b"forward"), (1, b"forward"), (0, b"backward")):
    print(kernel_and_launch(device, name))
assert d.door_launch(1, kernel(d, 4, "forward"), 1, 32, 0, None, 0, 0.0) is None
print(len(seen), c_int.in_dll(library, "capture_mode").value)
"""
    told = "{} is not loaded yet, and cannot be while a CUDA graph is captured"
    assert launching(folder, code) == [
        told.format("forward") + " 0", "None", "None", told.format("forward"), told.format("backward"), "3 0"
    ]  # fmt: skip


def test_a_device_without_a_stream(folder):
    code = "print(d.door_stream(6, byref(c_void_p())).decode())"
    (line,) = launching(folder, code)
    assert line.endswith("pmrl_kernels: PyTorch tells no stream of cuda:6")


def test_importing_starts_no_cuda(folder):
    """Where there is a driver to be found: it is not even mapped before someone asks, but for what torch needs itself,
    whose cuBLAS maps it. And nobody has called it."""
    code = """
import ctypes, torch
def mapped():
    return "libcuda.so" in open("/proc/self/maps").read()
by_torch = mapped()
import pmrl_kernels
pmrl_kernels.dominant_sv_loss(torch.eye(3), torch.eye(3))
print(mapped() == by_torch)
calls = (ctypes.c_char * (1 << 16)).in_dll(ctypes.CDLL("libcuda.so.1"), "calls")
print(mapped(), calls.value)
"""
    variables = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "b''"], done.stderr
