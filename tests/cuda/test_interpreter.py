"""What nvcc makes of CUDA C++ runs on a CPU, and what is wrong with it raises: tests/tools/ptx.py on interpreted.cu."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools import ptx
from tests.tools.kept import kept

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH, which compiles the kernels")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCE = Path(__file__).with_name("interpreted.cu")
# As kernels of the package are compiled.
FLAGS = ("-ptx", "-std=c++17", "-O3", "-prec-div=false", "-prec-sqrt=false")
T = 64  # two warps


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    """PTX by architecture."""
    folder = kept("interpreted", compile_modules, *FLAGS, *ARCHITECTURES)
    return {name: (folder / f"{name}.ptx").read_text() for name in ARCHITECTURES}


def compile_modules(folder: Path) -> None:
    running = [
        subprocess.Popen(
            [NVCC, *FLAGS, f"-arch={name}", SOURCE, "-o", folder / f"{name}.ptx"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ARCHITECTURES
    ]
    for one in running:
        out, err = one.communicate(timeout=600)
        assert (one.returncode, out, err) == (0, "", "")


@pytest.fixture(params=ARCHITECTURES)
def module(request: pytest.FixtureRequest, modules: dict[str, str]) -> str:
    return modules[request.param]


@pytest.fixture
def sm_90(modules: dict[str, str]) -> str:
    return modules["sm_90"]


def launch(module: str, name: str, *arguments: object, programs: int = 1, shared: int = 0, **options: object) -> None:
    ptx.execute(module, shared, programs, arguments, name=name, **options)


def doubles(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def rows(*x: torch.Tensor, factor: float = 1.0) -> bytes:
    """struct Rows."""
    return struct.pack("4Q4qf4x", *[one.data_ptr() for one in x], *[one.stride(0) for one in x], factor)


# What the tests below are of; an nvcc that no longer emits it would leave them empty.
EMITTED = (
    r"\.param \.align 8 \.b8 \w+\[72\]",
    r"\.maxntid 64",
    r"\.shared \.align \d+ \.\w+ \w+held\[512\]",
    r"\.local \.align",
    r"cvta\.local",
    r"cvta\.shared",
    r"cvta\.to\.global",
    r"ld\.[bf]64",
    r"ld\.param\.\w+\s+%\w+, \[%rd",
    r"ld\.const",
    r"\{\.reg \.f16 low,high;",
    r"shfl\.sync\.up\.b32\s+%r\d+\|%p\d+, %r\d+, %r\d+, %r",
    r"bar\.warp\.sync",
    r"membar\.gl",
    r"ld\.volatile\.global",
    r"atom\.shared\.add",
    r"(div\.full|sqrt\.approx|rcp\.approx)\.f32",
    r"cvt\.rz\.f32\.f64",
    r"div\.s32",
    r"mul\.hi",
    r"bfi\.b32",
)


def test_nvcc_emits_what_is_tested(module):
    for pattern in EMITTED:
        assert re.search(pattern, module), pattern


# ------------------------------------------------------------------------------------------------
# Parameters
# ------------------------------------------------------------------------------------------------


def test_structs_and_numbers_are_parameters(module):
    x = [torch.randn(T, stride, dtype=torch.float64)[:, 0] for stride in (1, 2, 3, 4)]
    for which in (0, 2):
        y = doubles(T)
        launch(module, "rows_from_a_struct", rows(*x, factor=0.25), 2.5, 0.5, which, 40, y)
        assert torch.equal(y[:40], x[which][:40] * 0.25 + 1.25)
        assert y[40:].isnan().all()


@pytest.mark.parametrize("kernel", ["rows_by_thread", "rows_in_place"])
def test_a_struct_that_each_thread_reads_at_its_own_place(module, kernel):
    x, y = [torch.randn(T, stride, dtype=torch.float64)[:, 0] for stride in (1, 2, 3, 4)], doubles(T)
    launch(module, kernel, rows(*x), y)
    assert torch.equal(y, torch.stack(x, 1)[torch.arange(T), torch.arange(T) % 4])


def test_a_launch_has_programs_and_threads(sm_90):
    y = torch.zeros(5 * T, dtype=torch.int32)
    launch(sm_90, "numbered", y, programs=5)
    assert (y == 5064).all()
    y.zero_()
    launch(sm_90, "numbered", y, programs=2, threads=40)  # __launch_bounds__ is a maximum
    assert (y[:80] == 2040).all()
    assert (y[80:] == 0).all()
    launch(sm_90, "unbounded", y, threads=5 * T)
    assert torch.equal(y, torch.arange(5 * T).int())


def test_a_launch_that_does_not_fit_is_refused(sm_90):
    y = torch.zeros(T, dtype=torch.int32)
    with pytest.raises(ValueError, match="threads: numbered has up to 64, not 65"):
        launch(sm_90, "numbered", y, threads=65)
    with pytest.raises(ValueError, match="threads: unbounded"):
        launch(sm_90, "unbounded", y)
    with pytest.raises(ValueError, match="rows_by_thread_param_0: 8 bytes, not 72"):
        launch(sm_90, "rows_by_thread", bytes(8), y)
    with pytest.raises(ValueError, match="arguments: rows_from_a_struct has 6, not 4"):
        launch(sm_90, "rows_from_a_struct", bytes(72), 2.5, 0.5, 0)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def test_pointers_to_any_memory(module):
    """Global, declared shared and local by one generic pointer; the shared memory of a launch behind the declared."""
    x, where, y = torch.randn(T, dtype=torch.float64), torch.randint(4, (T,), dtype=torch.int32), doubles(3 * T)
    x = x.float().double()
    launch(module, "spaces", x, where, y, shared=8 * T)
    at = torch.arange(T)
    choices = torch.stack([x.flip(0), 10 * x.flip(0), 30 * x.flip(0), (at % 4 + 1) * x])
    assert torch.equal(y[:T], choices[where.long(), at])
    assert torch.equal(y[T : 2 * T], (20 * x.flip(0).float()).double())
    assert torch.equal(y[2 * T :], at.double() % 5)
    with pytest.raises(ptx.MemoryFaultError, match=r"shared memory: 8 bytes at .* belong to nobody"):
        launch(module, "spaces", x, where, y, shared=8 * T - 8)


def test_constants_and_variables_of_a_module(module):
    before = doubles(33)
    launch(module, "of_the_module", before)
    y = doubles(33)
    launch(module, "of_the_module", y)
    assert torch.equal(y[:32], torch.tensor([0.5, -2, 1e300], dtype=torch.float64).repeat(11)[:32])
    assert y[32] == before[32] + 1  # it lives on
    assert y[32] > 41


def test_local_memory_is_each_threads_own(module):
    at = torch.tensor([3, 3, 0, 7, 1, 5, 5, 2, 5], dtype=torch.int32)
    start = torch.randint(9, (8,)).double()
    y = torch.cat([start, doubles(T)])
    launch(module, "local_array", at, y)
    own = start[:, None] + torch.arange(T)
    for i in range(8):
        own[int(at[i])] += own[i]
    assert torch.equal(y[8:], own[5])


def test_a_place_beyond_local_memory(sm_90):
    at, y = torch.tensor([0] * 8 + [8], dtype=torch.int32), torch.zeros(8 + T).double()
    with pytest.raises(ptx.MemoryFaultError, match="local memory: 8 bytes at 0x40 belong to nobody"):
        launch(sm_90, "local_array", at, y)


def test_memory_that_nobody_wrote_shows(module):
    y, at = torch.zeros(2 * T).double(), torch.tensor([2, 6, 6, 3], dtype=torch.int32)
    launch(module, "unwritten", at, y)
    assert (y[:32] == 1).all()
    assert y[32:T].isnan().all()
    assert (y[T::2] == 2).all()
    assert y[T + 1 :: 2].isnan().all()


def test_atomics(module):
    x, y = torch.randint(8, (T,), dtype=torch.int32), torch.zeros(15, dtype=torch.int32)
    y[9], y[11], y[14] = 5, 7, 8
    wrapped = torch.tensor([3], dtype=torch.int32)
    launch(module, "atomics", x, y, wrapped, programs=2)
    assert torch.equal(y[:8], 2 * torch.bincount(x, minlength=8).int())
    assert y[8:10].tolist() == [int(x.max()), int(x.min())]
    assert y[10] == sum(1 << int(v) for v in x.unique())
    assert y[11:].tolist() == [70, 8, 9, 9]
    assert wrapped == (3 + 2 * T) % 10


def test_memory_that_python_does_not_see(sm_90):
    """As what a library allocates: an address is enough, if the launch is told of it."""
    x, y = np.arange(3.0), np.zeros(3)
    arguments = x.ctypes.data, 3, y.ctypes.data
    launch(sm_90, "doubled", *arguments, owned=[(x.ctypes.data, 24), (y.ctypes.data, 24)])
    assert y.tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(ptx.MemoryFaultError, match="belong to nobody"):
        launch(sm_90, "doubled", *arguments, owned=[(x.ctypes.data, 24), (y.ctypes.data, 16)])


# ------------------------------------------------------------------------------------------------
# Lanes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "by"), [(32, 1), (32, 16), (8, 3), (8, 4), (16, 15), (2, 1)])
def test_shuffles_within_segments(module, width, by):
    x, y = torch.randn(T, dtype=torch.float64), doubles(4 * T)
    launch(module, "segments", x, width, by, y)
    lane, start = torch.arange(T) % width, torch.arange(T) // width * width
    inside = [(lane ^ by) < width, lane - by >= 0, lane + by < width, torch.full((T,), True)]
    source = [lane ^ by, lane - by, lane + by, torch.full((T,), by % width)]
    for at, (there, which) in enumerate(zip(inside, source, strict=True)):
        assert torch.equal(y[at * T : at * T + T], torch.where(there, x[start + torch.where(there, which, 0)], x)), at


def test_lanes_exchange_with_those_that_are_there(module):
    x, y = torch.arange(T, dtype=torch.int32), torch.full((T,), -1, dtype=torch.int32)
    launch(module, "exchange_of_half", x, y)
    here = x % 32 < 16
    assert torch.equal(y, torch.where(here, x ^ 1, -1))
    with pytest.raises(ptx.RaceError, match="0x0000ffff of the lanes of warp 0 exchange values, and name 0xffffffff"):
        launch(module, "exchange_with_nobody", x, y)


def test_votes(module):
    x, y = torch.randint(1, 7, (T,), dtype=torch.int32), torch.zeros(3 * T, dtype=torch.int32)
    x[50] = 7
    launch(module, "votes", x, y)
    for warp in (slice(0, 32), slice(32, 64)):
        ballot = sum(1 << i for i, v in enumerate(x[warp].tolist()) if v > 4)
        assert {v & 0xFFFFFFFF for v in y[:T][warp].tolist()} == {ballot}
        assert set(y[T : 2 * T][warp].tolist()) == {2 + (warp.start > 0)}
        assert set(y[2 * T :][warp].tolist()) == {int(x[warp].sum())}


# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------


def nearest_bfloat16(q: torch.Tensor) -> torch.Tensor:
    """By the two candidates around each number, ties to even."""
    down = (q.float().view(torch.int32) & -65536).view(torch.float32)  # towards zero, or one further for what rounds up
    candidates = torch.stack([(down.view(torch.int32) + (step << 16)).view(torch.float32) for step in (-1, 0, 1)])
    distance = (candidates.double() - q).abs()
    odd = (candidates.view(torch.int32) >> 16 & 1) == 1
    best = distance == distance.amin(0)
    best &= ~(odd & (best.sum(0) > 1))
    return candidates.gather(0, best.int().argmax(0, keepdim=True))[0].bfloat16()


def test_conversions(module):
    """Ties, numbers beside them that float32 does not tell from ties, overflow, numbers below the normal, NaN."""
    f = torch.randn(T) * 10 ** torch.linspace(-9, 6, T)
    f[:6] = torch.tensor([1 + 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, torch.inf, torch.nan, 2.0**-24])
    q = f.double()
    q[6:8] = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40], dtype=torch.float64)
    q[8:10] = torch.tensor([1e300, -1e300], dtype=torch.float64)
    q[10:] += q[10:] * 2.0**-30
    h, b = torch.randn(T).half(), torch.randn(T).bfloat16()
    to_half, to_bfloat16 = torch.zeros(4 * T).half(), torch.zeros(4 * T).bfloat16()
    to_float = torch.zeros(6 * T)
    launch(module, "conversions", f, q, h, b, to_half, to_bfloat16, to_float)

    def equal(got, want):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

    pairs = torch.stack([f, f.flip(0)], 1).ravel()
    equal(to_half[:T], f.half())
    with np.errstate(over="ignore"):
        equal(to_half[T : 2 * T], torch.from_numpy(q.numpy().astype(np.float16)))
    equal(to_half[2 * T :], pairs.half())
    equal(to_bfloat16[:T], f.bfloat16())
    usual = torch.arange(T) >= 6
    usual[8:10] = False
    equal(to_bfloat16[T : 2 * T][usual], nearest_bfloat16(q[usual]))
    equal(to_bfloat16[T : 2 * T][8:10], torch.tensor([torch.inf, -torch.inf]).bfloat16())
    equal(to_bfloat16[2 * T :], pairs.bfloat16())
    equal(to_float[:T], h.float())
    equal(to_float[T : 2 * T], b.float())
    halves = h.float().view(-1, 2)
    equal(to_float[2 * T : 3 * T], (halves[:, 0] - halves[:, 1]).repeat(2))
    zero, up, down = to_float[3 * T :].view(3, T).double()
    here = ~q.isnan()
    assert (down[here] <= q[here]).all()
    assert (q[here] <= up[here]).all()
    assert torch.equal(zero[here], torch.where(q > 0, down, up)[here])
    exact = q.float().double() == q
    assert torch.equal((up == down)[here], exact[here])
    largest = torch.finfo(torch.float32).max
    assert zero[8:10].tolist() == [largest, -largest]


def test_integers(module):
    n, m = -7, 1_000_000_007
    x = torch.randint(-(2**31), 2**31, (T,)).int()
    x[0] = 0
    u = torch.randint(-(2**62), 2**62, (T,)) * 2 + 1
    y, v = torch.zeros(10 * T, dtype=torch.int32), torch.zeros(3 * T, dtype=torch.int64)
    launch(module, "integers", x, u, n, m, y, v)
    got = [[value & 0xFFFFFFFF for value in part] for part in y.view(10, T).tolist()]
    M = 2**32 - 1
    for i, (a, other) in enumerate(zip(x.tolist(), x.flip(0).tolist(), strict=True)):
        bits = a & M
        quotient = abs(a) // 7 * (1 if a < 0 else -1)
        inserted = n & M & ~(127 << 3) | (bits & 127) << 3
        want = [
            quotient,
            a - quotient * n,
            a * 123456789 >> 32,
            bits.bit_count() + 100 * (32 - bits.bit_length()),
            int(f"{bits:032b}"[::-1], 2),
            (bits & -bits).bit_length(),
            (((other & M) << 32 | bits) << i % 32) >> 32,  # the upper half
            inserted,
            bits >> i % 32 & 511,
            bits ^ other ^ n,
        ]
        assert [part[i] for part in got] == [value & M for value in want], i
    whole = [value & (2**64 - 1) for value in u.tolist()]
    got = [[value & (2**64 - 1) for value in part] for part in v.view(3, T).tolist()]
    assert got[0] == [a // m for a in whole]
    assert got[1] == [a % 1000003 for a in whole]
    assert got[2] == [a * b >> 64 for a, b in zip(whole, whole[::-1], strict=True)]


FUNCTIONS = (  # of x and z, in float64
    lambda x, z: x / z,
    lambda x, z: x.sqrt(),
    lambda x, z: x.rsqrt(),
    lambda x, z: 1 / z,
    lambda x, z: z.exp(),
)


def test_approximate_functions_are_exact_unless_they_are_to_be_noisy(module):
    x, z = torch.rand(T) * 100, torch.randn(T)
    results = {}
    for how in ("exact", "noisy", "again"):
        y = torch.zeros(5 * T)
        if how == "exact":
            launch(module, "functions", x, z, y)
        else:
            with ptx.approximating(2.0**-20):
                launch(module, "functions", x, z, y)
        results[how] = y.view(5, T).double()
    want = torch.stack([f(x.double(), z.double()) for f in FUNCTIONS])
    error = {how: ((y - want) / want).abs().amax(1) for how, y in results.items()}
    half = 2.0**-24
    assert (error["exact"][:4] <= half * 1.001).all()
    assert error["exact"][4] < 4 * half
    assert (error["noisy"] > 2.0**-22).all()
    assert (error["noisy"] < 2.0**-19.8).all()
    assert torch.equal(results["noisy"], results["again"])


def test_directed_rounding(module):
    x, f, y = torch.rand(T).double() * 2.0**-60 + 2.0**-90, 1 + torch.rand(T), doubles(5 * T)
    launch(module, "directions", x, f, y)
    down, up, zero, fma_up, fma_down = y.view(5, T)
    assert (down == 1).all()
    assert (up == 1 + 2.0**-52).all()
    assert (zero == -1 + 2.0**-53).all()
    exact = f.double() ** 2 + 1
    assert ((fma_down <= exact) & (exact <= fma_up)).all()
    between = exact.float().double() != exact
    assert torch.equal(
        fma_up, torch.where(between, fma_down.float().nextafter(torch.tensor(torch.inf)), fma_down.float()).double()
    )


# ------------------------------------------------------------------------------------------------
# Order
# ------------------------------------------------------------------------------------------------

BLOCKS = 5


def add_up(module: str, kernel: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, partial, counter, total = torch.randn(BLOCKS, T).double(), doubles(BLOCKS), torch.zeros(1).int(), doubles(1)
    launch(module, kernel, x, partial, counter, total, programs=BLOCKS)
    return x, counter, total


def test_the_last_program_adds_up(module):
    x, counter, total = add_up(module, "last_adds_up")
    torch.testing.assert_close(total, x.sum()[None])
    assert counter == 0


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "last_adds_up_without_fence",
            r"global memory: thread 0 of program 4 reads what thread 0 of program 0 wrote, with no fence",
        ),
        (
            "last_adds_up_without_barrier",
            r"shared memory: thread 0 of program 0 reads what thread 32 of program 0 wrote",
        ),
        (
            "last_adds_up_not_volatile",
            r"global memory: thread 0 of program 4 reads what thread 0 of program 0 wrote, with no b",
        ),
    ],
)
def test_the_last_program_must_not_read_too_soon(module, kernel, message):
    with pytest.raises(ptx.RaceError, match=message):
        add_up(module, kernel)


@pytest.mark.parametrize(
    ("order", "threads"), [("barrier_and_fence", T), ("barrier_of_lanes_and_fence", 32), ("fences_and_barrier", T)]
)
def test_what_all_threads_leave_for_the_last_program(module, order, threads):
    partial, counter, y = doubles(3 * threads), torch.zeros(1).int(), doubles(3, threads)
    launch(module, f"left_before_{order}", partial, counter, y, programs=3, threads=threads)
    assert torch.equal(y, torch.arange(threads).flip(0).double().expand(3, threads))


@pytest.mark.parametrize("order", ["nothing", "barrier_of_lanes_and_fence", "fences"])
def test_a_fence_is_for_those_before_a_barrier(module, order):
    """A fence of one thread says nothing of another warp's writes; nor do everyone's, if they may come too late."""
    partial, counter, y = doubles(3 * T), torch.zeros(1).int(), doubles(3, T)
    with pytest.raises(ptx.RaceError, match=r"reads what thread \d+ of program 0 wrote, with no fence"):
        launch(module, f"left_before_{order}", partial, counter, y, programs=3)


@pytest.mark.parametrize(
    ("kernel", "mistaken", "message"),
    [
        ("reversed", "reversed_without_barrier", "shared memory: .* reads what"),
        ("reversed_lanes", "reversed_lanes_without_barrier", "shared memory: .* reads what"),
        ("reversed_lanes", "reversed_lanes_by_volatile", "shared memory: .* reads what"),
        ("reused", "reused_too_soon", "shared memory: .* writes where"),
    ],
)
def test_a_barrier_left_out(module, kernel, mistaken, message):
    x, y = torch.randn(2 * T).double(), doubles(2 * T)
    launch(module, kernel, x, y)
    n = 32 if "lanes" in kernel else T
    done = 2 * T if kernel == "reused" else T
    assert torch.equal(y[:done].view(-1, n), x[:done].view(-1, n).flip(1))
    with pytest.raises(ptx.RaceError, match=message):
        launch(module, mistaken, x, y)


def test_a_bound_left_out(module):
    x, y = torch.randn(100).double(), doubles(100)
    launch(module, "doubled", x, 100, y, programs=2)
    assert torch.equal(y, 2 * x)
    with pytest.raises(ptx.MemoryFaultError, match=r"8 bytes at 0x\w+ belong to nobody\ndoubled_beyond, program 1"):
        launch(module, "doubled_beyond", x, 100, y, programs=2)


# ------------------------------------------------------------------------------------------------
# What is counted, and what is refused
# ------------------------------------------------------------------------------------------------


def test_instructions_are_counted_by_warps(module):
    """Four warps read, three go on n times through a loop, take a root and write, and a part of one writes more."""
    x, y, n = torch.rand(128).double(), doubles(136), 11
    with ptx.counting() as kinds, ptx.counting(str) as opcodes:
        launch(module, "counted", x, n, y)
        launch(module, "counted", x, 1, y)
    assert opcodes["fma.rn.f64"] == kinds["float64"] == 3 * (n + 1)
    assert kinds["float64 function"] == opcodes["sqrt.rn.f64"] == 2 * 3
    assert kinds["global load"] == 2 * 4
    assert kinds["global store"] == 2 * (3 + 1)
    assert kinds.total() == opcodes.total()
    launch(module, "counted", x, n, y)
    assert opcodes["fma.rn.f64"] == 3 * (n + 1)  # no longer


def test_an_opcode_has_a_kind():
    kinds = {
        "fma.rn.f64": "float64",
        "setp.lt.f64": "float64",
        "div.rn.f64": "float64 function",
        "rsqrt.approx.f32": "float32 function",
        "cvt.rn.f32.f64": "float64 conversion",
        "cvt.rn.bf16x2.f32": "conversion",
        "ld.volatile.global.f64": "global load",
        "st.global.cs.v4.u32": "global store",
        "ld.shared.f64": "shared load",
        "ld.param.u64": "parameter load",
        "shfl.sync.bfly.b32": "shuffle",
        "atom.global.add.u32": "atomic",
        "mul.wide.s32": "integer",
        "mov.f64": "move",
        "bar.warp.sync": "barrier",
        "bra.uni": "branch",
    }
    assert {opcode: ptx.kind(opcode) for opcode in kinds} == kinds


def test_warps_meet_at_a_barrier_with_a_number(module):
    x = torch.randn(64).double()
    expected = torch.cat([x[:32], x[:32].flip(0)])
    launch(module, "meeting", x)
    assert torch.equal(x, expected)
    with pytest.raises(ptx.RaceError, match="wait for one another at different barriers"):
        launch(module, "meeting_elsewhere", x)


def test_copies_are_there_when_they_have_been_waited_for(module):
    x, y = torch.randn(128).double(), doubles(128)
    launch(module, "copied_ahead", x, y)
    x[74:76] = 0.0  # the one of no bytes
    assert torch.equal(y, x)
    y = doubles(128)
    launch(module, "copied_too_late", x, y)
    assert torch.equal(y[:64], x[:64])
    assert y[64:].isnan().all()


def test_a_kernel_that_gives_up(sm_90):
    x = torch.zeros(32, dtype=torch.int32)
    launch(sm_90, "trapped", x)
    x[7] = -1
    with pytest.raises(RuntimeError, match="gives up"):
        launch(sm_90, "trapped", x)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("floating_atomic", r"atom\.global\.add\.f64"),
        ("calling", r"\.param"),
        ("barrier_of_some", "some lanes"),
        ("barrier_of_half", "some threads"),
    ],
)
def test_what_is_not_known_is_refused(sm_90, kernel, what):
    with pytest.raises(NotImplementedError, match=what):
        launch(sm_90, kernel, torch.zeros(64).double(), *([3] if kernel == "calling" else []))
