"""The Triton backend without a GPU: interpreted, compiled ahead of time, and its launches counted.

Interpreting and compiling exclude one another in a process, and are done in others. The contract itself is that of all
backends (test_contract.py).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no packages for this system")

DATA = Path(__file__).resolve().parent / "data"
ROOT = DATA.parent.parent
sys.path.insert(0, str(DATA))

import resources  # noqa: E402

from pmrl_kernels import compilation  # noqa: E402
from pmrl_kernels.ops import constants, reference, triton  # noqa: E402
from pmrl_kernels.ops.triton import kspace, launch  # noqa: E402

if launch.INTERPRETED:
    pytest.skip("this process interprets; these tests start such processes themselves", allow_module_level=True)


def run(*arguments: str, timeout: int = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another Python process, single-threaded."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PMRL_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_interpreted(*arguments: str) -> int:
    """The number of tests that passed in the interpreter; none may fail."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    done = run(*command, timeout=3600, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


# ------------------------------------------------------------------------------------------------
# In the interpreter
# ------------------------------------------------------------------------------------------------


def test_a_sample_of_the_contract():
    assert run_interpreted("tests/test_contract.py", "-k", "triton", "--one-in", "80") >= 40


def test_a_sample_of_what_compilers_do_with_it():
    assert run_interpreted("tests/test_citizenship.py", "-k", "triton and compile", "--one-in", "4") >= 5


@pytest.mark.slow
def test_the_contract(sampled):
    """A part of it that takes some minutes, and what torch makes of the operators.

    All of it: TRITON_INTERPRET=1 python -m pytest tests/test_contract.py -k triton
    """
    parts = (  # the longest first
        ("tests/test_citizenship.py", "triton", sampled(8)),
        ("tests/test_contract.py", "triton-latency", sampled(8)),
        ("tests/test_contract.py", "triton-throughput", sampled(8)),
        ("tests/test_contract.py", "triton-pairs", sampled(8)),
        ("tests/test_gpu.py", "test", sampled(1, "--every")),
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(run_interpreted, path, "-k", which, *share) for path, which, share in parts]
        assert min(one.result() for one in started) >= 5


# ------------------------------------------------------------------------------------------------
# Ahead of time
# ------------------------------------------------------------------------------------------------


def compiled(*arguments: str) -> str:
    done = run(str(DATA / "resources.py"), *arguments, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert not done.stderr  # some errors of AMD's compiler show there alone
    return done.stdout


def compiled_for(target: str, one: launch.Launch) -> Any:
    return launch.compile_for(resources.TARGETS[target], one.kernel, one.compilation())


def rows_of(text: str) -> dict[tuple[str, ...], list[list[int]]]:
    """(target, call, dtype, k, kernel, warps) -> registers, stack, shared memory of each kernel that is called so."""
    rows: dict[tuple[str, ...], list[list[int]]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            row = line.split()
            rows.setdefault(tuple(row[:6]), []).append(list(map(int, row[6:9])))
    return rows


def test_kernels_compile_without_spills():
    rows = rows_of(compiled("--quick"))
    assert {key[0] for key in rows} == {case.target for case in resources.QUICK}
    assert {key[4] for key in rows} >= {"forward_kernel", "gram_kernel", "solve_kernel", "backward_kernel"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_on_tensor_cores_compile(dtype):
    """Triton 3.6 has a layout for their operands only if it sees no narrow load behind them."""
    for one in resources.launches(resources.Case("sm_90", "alignment", dtype, 12, masked=True)):
        binary = compiled_for("sm_90", one)
        if one.kernel.fn.__name__ != "reduce_kernel":
            assert re.search(r"\bmma\.sync\S*f64", binary.asm["ptx"])


def test_two_modalities_compile():
    """Triton 3.6 could not lay out the columns of 2 x 2 matrices."""
    for one in resources.launches(resources.Case("sm_90", "triplet", "fp32", 2)):
        assert compiled_for("sm_90", one).asm["cubin"]


@pytest.mark.slow
def test_resources_are_those_of_the_table(sampled):
    """A kernel that takes more than it did is seen where it is reviewed: `make resources` rewrites the table."""
    text, written = compiled(*sampled(1, "--every")), resources.TABLE.read_text()
    assert text.splitlines()[0] == written.splitlines()[0], "another version of Triton: rewrite the table"
    rows, table = rows_of(text), rows_of(written)
    cases = {key[:4] for key in rows}
    assert rows == {key: row for key, row in table.items() if key[:4] in cases}
    assert len(cases) >= 5


def test_binaries_take_what_launches_pass():
    """Arguments go to the compiled function as they are: what has a value, in order, tuples flattened."""
    for one in resources.launches(resources.Case("sm_90", "pmrl", "fp32", 3, masked=True)):
        passed = []
        for name, value in zip(one.kernel.arg_names, one.values, strict=False):
            for part in value if isinstance(value, tuple) else (value,):
                short = name in launch._SHORT and not isinstance(part, torch.Tensor)
                passed += [] if part is None else [32 if short else 64]
        binary = compiled_for("sm_90", one)
        entry = binary.asm["ptx"].partition(".entry")[2].partition(")")[0]
        taken = [int(width) for width in re.findall(r"\.param \.[a-z](\d\d)", entry)]
        assert taken == [*passed, 64, 64], "two more are Triton's own"


def test_sums_in_pairs_use_no_float64():
    """Streams would go at its rate: nothing d numbers long may need it, only a few numbers for each instance."""
    per_element = r"\b(?:mul|fma|div|sqrt)[\w.]*\.f64"
    counted = {}
    for call in ("alignment", "pmrl"):
        for one in resources.launches(resources.Case("sm_120", call, "fp32", 3)):
            name = one.kernel.fn.__name__
            if name not in ("gram_kernel", "vectors_kernel", "backward_kernel"):
                continue
            text = compiled_for("sm_120", one).asm["ptx"]
            loops = re.findall(r"^(\$L__BB\d+_\d+):(.*?)\bbra[.\w]*\s+\1;", text, re.MULTILINE | re.DOTALL)
            assert any("fma.rn.f32" in body for _, body in loops)
            counted[name] = sum(len(re.findall(per_element, body)) for _, body in loops)
    assert counted == dict.fromkeys(("gram_kernel", "vectors_kernel", "backward_kernel"), 0)


@pytest.mark.parametrize("stack", [0, 8])
@pytest.mark.parametrize("k", [8, 9])
def test_the_gate_sees_spills(k, stack):
    row = resources.Row(resources.Case("sm_90", "alignment", "fp32", k), "kernel", 1, 255, stack, 0, 1.0)
    assert bool(resources.faults(row)) == (stack > 0 and k <= 8)
    assert resources.faults(row._replace(stack=0, shared=1 << 20))


def test_nothing_adds_floating_point_numbers_atomically():
    """It would add them in another order each time."""
    atomics = []
    for one in resources.launches(resources.Case("sm_90", "alignment", "fp32", 3)):
        text = compiled_for("sm_90", one).asm["ptx"]
        atomics += re.findall(r"\b(?:atom|red)\.[\w.:]+", text)
    assert atomics, "the last program of solve_kernel is found by counting"
    assert not [name for name in atomics if re.search(r"\.(f|bf)\d+", name)]


# ------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------

OUTPUTS = {
    "alignment": constants.ALIGNMENT_MEAN,
    "values": constants.SIGMA,
    "everything": constants.ALIGNMENT_MEAN | constants.SIGMA | constants.U | constants.V | constants.Z,
}


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[str]]:
    names: list[str] = []
    monkeypatch.setattr(launch, "run", lambda one: names.append(one.kernel.fn.__name__))
    return names


@pytest.mark.parametrize(
    ("wanted", "B", "forward"),
    [
        ("alignment", 64, ["forward_kernel", "reduce_kernel"]),
        ("values", 64, ["forward_kernel"]),
        ("everything", 64, ["forward_kernel", "reduce_kernel"]),
        ("alignment", 65536, ["gram_kernel", "solve_kernel"]),
        ("values", 65536, ["gram_kernel", "solve_kernel"]),
        ("everything", 65536, ["gram_kernel", "solve_kernel", "vectors_kernel"]),
        ("everything", 0, []),
    ],
)
def test_launches(launched, wanted, B, forward):
    """One or two for the alignment term forward, one backward whatever comes in."""
    xs = [torch.empty(B, 4) for _ in range(3)]
    options = (None, None, 0.05, True, True, OUTPUTS[wanted])
    outputs, state = launch.forward(xs, *options)
    assert launched == forward
    launch.backward(xs, *options, state, outputs, [True, False, True])
    assert launched == forward + (["backward_kernel"] if B else [])


def test_a_large_batch_is_summed_by_several_programs(monkeypatch):
    """Also for k > 8, where no solve_kernel does it on its way."""
    launched: dict[str, launch.Launch] = {}
    monkeypatch.setattr(launch, "run", lambda one: launched.update({one.kernel.fn.__name__: one}))
    for B, programs in ((launch.SHARE, 1), (launch.SHARE + 1, 2), (65536, 64)):
        launch.forward([torch.empty(B, 4) for _ in range(12)], None, None, 0.05, True, True, OUTPUTS["alignment"])
        one = launched["reduce_kernel"]
        values = dict(zip(one.kernel.arg_names, one.values, strict=False))
        assert one.programs == programs
        assert (values["counter"] is None) == (values["partial"] is None) == (programs == 1)


class Compiled:
    """In place of a compiled kernel: whether what it is launched with is what it was compiled for."""

    def __init__(self, kernel: Any, compilation: launch.Compilation) -> None:
        self.kernel, self.compilation, self.launches = kernel, compilation, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.check

    def check(self, *arguments: Any, stream: int) -> None:
        self.launches += 1
        kinds, parameters, divisible, _ = self.compilation
        values = arguments[: len(kinds)]
        assert arguments[len(kinds) :] == parameters
        for name, value, kind in zip(self.kernel.arg_names, values, kinds, strict=False):
            self.check_one(name, value, kind, dict(divisible).get(name, 1))

    def check_one(self, name: str, value: Any, kind: Any, multiple: int) -> None:
        if isinstance(kind, tuple):
            for part, one in zip(value, kind, strict=True):
                self.check_one(name, part, one, multiple)
        elif isinstance(value, torch.Tensor):
            assert (value.dtype, value.data_ptr() % multiple) == (kind, 0), name
        elif value is None or kind is None:
            assert value is kind, name
        else:
            assert isinstance(value, kind), name
            assert value % multiple == 0, name


@pytest.fixture
def compiled_kernels(monkeypatch) -> Iterator[dict[Any, Compiled]]:
    """What is kept for later launches, of a backend that compiles and launches as on a GPU but for the kernels."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: resources.TARGETS["sm_90"]))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    monkeypatch.setattr(launch, "compile_for", lambda target, kernel, compilation: Compiled(kernel, compilation))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return launch._compiled


@pytest.mark.parametrize("sums", ["float64", "float32"])
def test_a_kernel_is_launched_with_what_it_was_compiled_for(compiled_kernels, monkeypatch, sums):
    """Kernels are kept by a key. Equal keys must mean equal sources, whatever was called before: once a width was left
    out of it, by which backward_kernel differs, and a second width got the kernel of the first."""
    monkeypatch.setattr(launch, "SUMS", sums)
    for d, k, dtype, B, masked, learned, spectrum, name in itertools.product(
        (1, 16, 64, 100, 128, 256, 512, 1024),
        (2, 4, 12),
        (torch.float32, torch.bfloat16, torch.float64),
        (8, launch.LATENCY_BATCH + 8),
        (False, True),
        (False, True),
        (False, True),
        OUTPUTS,
    ):
        xs = [torch.empty(1, d, dtype=dtype).expand(B, d) for _ in range(k)]
        mask = torch.ones(1, k, dtype=torch.bool).expand(B, k) if masked else None
        tau = torch.ones(()) if learned else None
        options = (mask, tau, 0.05, True, spectrum, OUTPUTS[name])
        outputs, state = launch.forward(xs, *options)
        grads = [None, *outputs[1:]] if name == "everything" and masked else outputs
        launch.backward(xs, *options, state, grads, [True] * (k - 1) + [not masked])
    sources = {(launch._source(kernel, made).hash(), made.warps) for kernel, _, made in compiled_kernels}
    assert len(sources) == len(compiled_kernels) >= 300, "two keys for one source compile it twice"
    assert sum(one.launches for one in compiled_kernels.values()) > 3 * len(sources)


def test_a_first_call_while_a_graph_is_captured(compiled_kernels, monkeypatch):
    """To load a kernel would end the capture. What is there already runs."""
    xs = [torch.empty(8, 16) for _ in range(3)]
    options = (None, None, 0.05, True, True, OUTPUTS["alignment"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"forward_kernel is not compiled .* call pmrl_kernels\.warm_up"):
        launch.forward(xs, *options)
    assert not compiled_kernels
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch.forward(xs, *options)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch.forward(xs, *options)


def test_cards_with_slow_float64_sum_in_pairs(monkeypatch):
    """By the card, unless PMRL_KERNELS_SUMS says otherwise; embeddings in float64 and k > 8 never do."""
    slow = {name for name, target in resources.TARGETS.items() if launch.slow_float64(target)}
    assert slow == {"sm_75", "sm_120", "gfx1100"}
    assert launch.plan(8, 64, True, 4, True).pairs
    assert not launch.plan(8, 64, True, 4, False).pairs
    assert not launch.plan(8, 64, True, 8, True).pairs
    assert not launch.plan(9, 64, True, 4, True).pairs
    assert launch._in_pairs(0, "float32")
    assert not launch._in_pairs(0, "float64")
    with pytest.raises(ValueError, match="PMRL_KERNELS_SUMS: got 'bf16'"):
        launch._in_pairs(0, "bf16")
    for name, target in resources.TARGETS.items():
        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda target=target: target))
        monkeypatch.setattr(launch.triton.runtime, "driver", driver)
        launch._in_pairs.cache_clear()
        assert launch._in_pairs(0, None) == (name in slow)
    launch._in_pairs.cache_clear()


def test_warm_up_compiles_all_that_is_needed_later():
    code = """
import json, torch
from pmrl_kernels import dominant_singular_triplet, pmrl_loss, warm_up
from pmrl_kernels.ops.triton import launch

seen = set()
launch.run = lambda one: seen.add((one.kernel.fn.__name__, one.compilation()))

def calls(B):
    xs = [torch.randn(B, 32, requires_grad=True) for _ in range(3)]
    mask = torch.ones(B, 3, dtype=torch.bool)
    pmrl_loss(dict(zip("abc", xs)), mask={name: mask[:, 0] for name in "abc"}).backward()
    dominant_singular_triplet(xs[0].detach(), *xs[1:]).sigma.sum().backward()

xs = [torch.randn(5, 32) for _ in range(3)]
mask = torch.ones(5, dtype=torch.bool)
warm_up(pmrl_loss, dict(zip("abc", xs)), mask=dict.fromkeys("abc", mask))
xs[1].requires_grad_(), xs[2].requires_grad_()
warm_up(lambda *xs: dominant_singular_triplet(*xs).sigma, *xs)
assert all(x.grad is None for x in xs)
before = set(seen)
for B in (1, 3, launch.LATENCY_BATCH, launch.LATENCY_BATCH + 1, 3000):
    calls(B)
print(len(before), len(seen))
"""
    done = run("-c", code, TRITON_INTERPRET="1", PMRL_KERNELS_BACKEND="triton")
    assert done.returncode == 0, done.stderr[-2000:]
    compiled_before, needed = map(int, done.stdout.split())
    assert compiled_before == needed >= 8


def test_warm_up_takes_a_batch_of_each_kind():
    small, large = compilation._BATCHES
    assert small <= min(launch.LATENCY_BATCH, launch.SHARE)
    assert large > max(launch.LATENCY_BATCH, launch.SHARE)


def test_shapes_without_running(launched):
    """Outputs are those of the reference, the state is as large as the fake one that torch.compile sees."""
    for stacked in (False, True):
        xs = [torch.empty(5, 3, 4)] if stacked else [torch.empty(5, 4) for _ in range(3)]
        for wanted in OUTPUTS.values():
            outputs, state = launch.forward(xs, None, None, 0.05, True, True, wanted)
            expected = reference.spectral_output_shapes(xs, True, wanted)
            assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]
            assert state[0].shape == (launch.state_size(5, 3),)


def test_operators_of_another_layout_have_another_name(monkeypatch):
    """torch.compile keeps compiled graphs on disk, states of a fixed size in them, by the names of operators."""
    name = triton._layout()
    assert re.fullmatch("[0-9a-f]{8}", name)
    assert triton._layout() == name
    monkeypatch.setattr(triton.pkgutil, "get_data", lambda package, file: b"another " + file.encode())
    assert triton._layout() != name
    monkeypatch.setattr(triton.pkgutil, "get_data", lambda package, file: None)
    assert re.fullmatch("[0-9a-f]{8}", triton._layout())


def test_a_record_has_room_for_its_fields():
    for k in (1, 2, 4, 9, 32):
        half = k * (k + 1) // 2
        fields = {name: kspace.field(k, name) for name in kspace._FIELDS}
        assert list(fields.values()) == sorted(fields.values())
        assert fields["through_alignment"] - fields["eigenvectors"] == k * k >= half
        assert kspace.field(k, "resolvent") == fields["eigenvectors"]
        assert fields["eigenvectors"] == half
        assert kspace.record_size(k) > fields["undecided"]


# ------------------------------------------------------------------------------------------------
# At home in an installation
# ------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch):
    assert triton.unavailable() is None or "TRITON_INTERPRET" in triton.unavailable()
    assert "not for cpu" in triton.rejects(torch.device("cpu"), torch.float32, 3, 64)
    assert triton.rejects(torch.device("cuda"), torch.float32, 12, 64) is None
    monkeypatch.setattr(triton, "_NO_FLOAT64_DOT", True)
    assert triton.rejects(torch.device("cuda"), torch.float32, 8, 64) is None
    assert "Triton 3.9" in triton.rejects(torch.device("cuda"), torch.float32, 9, 64)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_importing_the_package_imports_no_triton(interpret):
    code = (
        "import json, sys, pmrl_kernels.ops as ops\n"
        "print(json.dumps(['triton' in sys.modules, 'triton' in ops.available]))"
    )
    done = run("-c", code, TRITON_INTERPRET=interpret)
    imported, available = json.loads(done.stdout)
    assert not imported
    assert available or interpret == "0"


def test_auto_prefers_it_on_a_gpu_only():
    code = (
        "import torch, pmrl_kernels.ops as b\n"
        "resolve = lambda device: b.choose(tuple(b.available.values()), None, torch.device(device), torch.float32,"
        " 3, 64, {})[0]\n"
        "print(resolve('cuda'), resolve('cpu'))"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.stdout.split()[0] == "triton", done.stderr
    assert done.stdout.split()[1] in ("native", "triton")
