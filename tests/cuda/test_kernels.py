"""The spectral op for CUDA on a CPU (tests/tools/cuda_door.py): what its kernels compute, against the reference."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import ops
from pmrl_kernels.ops.spectral import spec
from tests.tools import cuda_door as cuda
from tests.tools import cuda_resources, kept, ptx
from tests.tools.installation import COMPILER
from tests.tools.samples import draw

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (COMPILER and shutil.which("nvcc")), reason="no C++ compiler, or no nvcc on the PATH"
)

EVERYTHING = spec.ALIGNMENT_MEAN | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W
# (B, d, dtypes, wanted, softmax, normalize, mask, learned temperature)
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (torch.float32,), (torch.float64,), (torch.bfloat16,), (torch.float16,)
MIXED = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "alignment": (37, 16, FLOAT32, spec.ALIGNMENT_MEAN, True, True, True, True),
    "alignment, each": (9, 40, BFLOAT16, spec.ALIGNMENT, True, True, False, True),
    "alignment, leading": (9, 16, FLOAT16, spec.ALIGNMENT_SUM, False, True, True, False),
    "everything": (9, 16, FLOAT32, EVERYTHING, True, True, True, True),
    "everything, leading": (9, 16, FLOAT32, EVERYTHING, False, True, True, True),
    "everything, as it is": (9, 16, FLOAT32, EVERYTHING, True, False, False, False),
    "everything, bfloat16": (9, 16, BFLOAT16, EVERYTHING, True, True, True, True),
    "everything, float64": (9, 16, FLOAT64, EVERYTHING, True, True, True, True),
    "everything, mixed": (9, 8, MIXED, EVERYTHING, True, True, True, False),
    "everything, mixed with float64": (9, 8, (*MIXED, torch.float64), EVERYTHING, True, False, True, False),
    "rows of no whole packs": (9, 7, FLOAT16, spec.ALIGNMENT | spec.U | spec.Z, False, False, True, False),
    "units": (9, 8, FLOAT32, spec.Z, True, True, True, False),
    "directions": (9, 9, BFLOAT16, spec.U | spec.W, True, True, True, False),
    "long rows": (9, 200, FLOAT32, spec.ALIGNMENT_MEAN | spec.SIGMA, True, True, True, True),
    "nobody": (0, 8, FLOAT32, spec.ALIGNMENT_MEAN | spec.U, True, True, False, True),
}
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
SLOW_FLOAT64 = "sm_86"
CALLS_OR_STACK = re.compile(r"\bcall\b|\.local\b")
LAYOUTS = {
    "throughput": (8, 12),
    "rows": (32, 7),
    "latency": (32, 1),
}


def batch(k: int, B: int, d: int, dtypes: Sequence[torch.dtype], scale: float = 1.0) -> list[Tensor]:
    """Instances with ties, zeros, opposite and equal embeddings and a NaN among others."""
    shared = torch.randn(B, d, dtype=torch.float64)
    xs = [shared + torch.randn(B, d, dtype=torch.float64) for _ in range(k)]
    if B > 6:
        xs[1][0] = xs[0][0]
        xs[0][1] = 0.0
        xs[-1][2] = -xs[0][2]
        for x in xs:
            x[3] = xs[0][3]
        xs[0][4, d // 2] = torch.nan
    return [(x * scale).to(dtypes[m % len(dtypes)]) for m, x in enumerate(xs)]


def assert_agrees(found: Sequence[Tensor], expected: Sequence[Tensor], exact: bool, scale: float) -> None:
    """Within what rounding float64 arithmetic once more does, and one unit of the dtype. Where every instance happens
    to be degenerate gradients are rounding errors alone, so nothing much smaller than ``scale`` counts."""
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        limits = {
            torch.float64: 1e-9 if exact else 1e-6,
            torch.float32: 4e-7,
            torch.bfloat16: 8e-3,
            torch.float16: 1e-3,
        }
        size = max(1e-6 * scale, y.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if y.numel() else 0.0)
        torch.testing.assert_close(x, y, rtol=limits[x.dtype], atol=1e-7 * size, equal_nan=True)


def check(door: cuda.Door, k: int, name: str, scale: float = 1.0) -> None:
    B, d, dtypes, wanted, spectrum, normalize, masked, learned = CASES[name]
    xs = batch(k, B, d, dtypes, scale)
    mask = torch.rand(B, k) > 0.3 if masked else None
    if mask is not None:  # what is absent is not read
        xs = [x.masked_fill(~mask[:, m, None], torch.inf) for m, x in enumerate(xs)]
    call = (xs, mask, torch.tensor(0.3) if learned else None, 0.3, normalize, spectrum, wanted)
    reference = ops.available["reference"].pairs["spectral"]
    outputs, state = door.forward(*call)
    expected, its_state = reference.forward(*call)
    exact = torch.float64 not in dtypes or len(dtypes) == 1
    size = min(scale, 1 / scale)
    assert_agrees(outputs, expected, exact, size)
    grads = [torch.randn(x.shape, dtype=x.dtype) for x in expected]
    needed = [m != 1 for m in range(k)]
    for incoming in (grads, [*grads[:1], *(None for _ in grads[1:])], [None, *grads[1:]]):
        if all(x is None for x in incoming):
            continue
        gradients = door.backward(*call, state, incoming, needed)
        assert_agrees(gradients, reference.backward(*call, its_state, incoming, needed), exact, size)


def slow(*case: object) -> object:
    """One of those that `make test` leaves to `make test-slow`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def of_each(name: str) -> Sequence[object]:
    """Layouts: all of the case that has everything, one of the others in turn, and what is left more slowly."""
    turn = list(CASES).index(name) % len(LAYOUTS)
    return [
        (name, layout) if at == turn or name == "everything" else slow(name, layout)
        for at, layout in enumerate(LAYOUTS)
    ]


@pytest.mark.parametrize(("name", "layout"), [case for name in CASES for case in of_each(name)])
def test_kernels_agree_with_the_reference(name, layout):
    check(cuda.door(*LAYOUTS[layout]), 3, name)


@pytest.mark.parametrize(
    ("k", "name", "layout"),
    [
        (4, "alignment", (8, 7, 3)),  # a share that no number of readers divides
        (4, "alignment, each", (16, 2, 2)),
        slow(4, "alignment, leading", (8, 32, 2)),
        (4, "everything", (32, 4, 2)),
        slow(4, "everything, as it is", (8, 2, 5)),
        slow(4, "long rows", (8, 3, 2)),
        slow(5, "long rows", (8, 1, 20)),
        slow(5, "alignment", (8, 31, 2)),
    ],
)
def test_one_warp_decomposes_what_others_read(k, name, layout):
    door = cuda.door(*layout)
    check(door, k, name)
    assert any(kernel.startswith("stream") for kernel, *_ in door.launches)


@pytest.mark.parametrize(
    ("k", "name"),
    [(4, "everything, float64"), (4, "rows of no whole packs"), slow(5, "alignment, each"), (3, "alignment")],
)
def test_what_does_not_come_in_rounds(k, name):
    door = cuda.door(8, 7, 3)
    check(door, k, name)
    assert not any(kernel.startswith("stream") for kernel, *_ in door.launches)


@pytest.mark.parametrize("name", ["everything, float64", slow("everything, leading"), "alignment"])
def test_what_hardware_approximates_is_made_exact(name):
    """Of reciprocals and roots it gives 20 bits, of angles fewer than float32 has."""
    with ptx.approximating(2.0**-20):
        check(cuda.door(), 4, name)


@pytest.mark.parametrize("scale", [1e180, 1e-180])
@pytest.mark.parametrize("name", ["everything, float64", slow("everything, mixed with float64")])
def test_float64_rows_whose_squares_leave_the_range(name, scale):
    check(cuda.door(), 3, name, scale)


# ---- sums in pairs of float32, on cards whose float64 is slow ----

BRIEF = ("alignment", "everything", "everything, bfloat16")


@pytest.mark.parametrize(
    ("k", "name", "layout"),
    [
        *((3, name, (8, 12)) for name in BRIEF),
        *(slow(3, name, (8, 12)) for name in CASES if name not in BRIEF),
        (3, "everything", (32, 1)),
        *(slow(3, "everything", layout) for layout in ((16, 4), (32, 7))),
        slow(6, "everything", (8, 12)),
    ],
)
def test_sums_in_pairs(k, name, layout):
    check(cuda.door(*layout, architecture=SLOW_FLOAT64), k, name)


@pytest.mark.parametrize("scale", [1e-38, *map(slow, (1e-20, 1e20, 1e37))])
@pytest.mark.parametrize(
    "name", ["alignment", "everything", slow("everything, as it is"), slow("everything, bfloat16")]
)
def test_what_pairs_have_no_numbers_for(name, scale):
    """Squares and inverse norms that are no float32."""
    check(cuda.door(8, 12, architecture=SLOW_FLOAT64), 3, name, scale)


@pytest.mark.parametrize("normalize", [True, slow(False)])
@pytest.mark.parametrize(
    ("rows", "incoming"), [slow(1e-15, 1e-24), slow(1e-9, 1e-30), (1e-15, 1e-27), slow(1e15, 1e-37), slow(1, 1e25)]
)
def test_incoming_gradients_that_pairs_have_no_numbers_for(rows, incoming, normalize):
    """Or whose products with rows are none, though gradients of these are ordinary float32 numbers."""
    xs, wanted = batch(3, 9, 16, FLOAT32, rows), spec.U | spec.Z | spec.W
    call = xs, None, None, 0.3, normalize, True, wanted
    door, reference = cuda.door(8, 12, architecture=SLOW_FLOAT64), ops.available["reference"].pairs["spectral"]
    outputs, state = door.forward(*call)
    for those in (range(1), range(1, 4), range(4, 7), range(7)):
        grads = [incoming * torch.randn(x.shape) if at in those else None for at, x in enumerate(outputs)]
        found = door.backward(*call, state, grads, [True] * 3)
        for x, y in zip(found, reference.backward(*call, reference.forward(*call)[1], grads, [True] * 3), strict=True):
            x, y = (rows / incoming * t.double()[5:] for t in (x, y))  # those before are degenerate
            torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-7 * y.abs().max().item() + 1e-45 * rows / incoming)


@pytest.mark.parametrize("of_others", [0.0, torch.nan, torch.inf, 1e-30])
def test_the_same_bits_in_pairs_whoever_is_beside(of_others):
    """Instances that pairs are no good for are summed anew in float64, and no others are."""
    xs = [x[7:] for x in batch(3, 22, 64, FLOAT32)]
    xs = [xs[0] + 1e-4 * x for x in xs]
    others = [x.clone() for x in xs]
    others[1][12] = of_others
    door = cuda.door(8, 16, architecture=SLOW_FLOAT64)
    options = None, None, 0.3, True, True, spec.ALIGNMENT | spec.SIGMA | spec.U
    keep = [i for i in range(15) if i != 12]
    (first, state), (second, other_state) = door.forward(xs, *options), door.forward(others, *options)
    for x, y in zip([*first, state[0].T], [*second, other_state[0].T], strict=True):
        torch.testing.assert_close(x[keep], y[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("d", [512, slow(4096)])
@pytest.mark.parametrize("layout", [(8, 12), (32, 4)])
def test_sums_of_equal_terms_in_pairs(d, layout):
    """Their rounding errors all have one sign. That does not turn a v whose entries add up to 0."""
    numbers = 1 + torch.rand(12, 1).mul(2**22).round() / 2**22
    xs = [c * numbers.expand(12, d) for c in (3.0, -1.0, -2.0)]
    call = xs, None, None, 0.3, False, True, spec.U | spec.V
    found, _ = cuda.door(*layout, architecture=SLOW_FLOAT64).forward(*call)
    expected, _ = ops.available["reference"].pairs["spectral"].forward(*call)
    assert_agrees(found, expected, True, 1.0)


@pytest.mark.parametrize("k", [slow(2), 3, slow(5)])
def test_pairs_are_nearly_as_exact_as_float64(k):
    """48 bits: small singular values, which are square roots of differences, too."""
    xs = batch(k, 9, 512, FLOAT32)
    xs = [xs[0] + 1e-3 * (x - xs[0]) for x in xs]
    call = xs, None, None, 0.3, True, True, spec.SIGMA | spec.U | spec.W
    found, expected = (cuda.door(8, 12, architecture=x).forward(*call)[0] for x in (SLOW_FLOAT64, "sm_90"))
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().nan_to_num(0.0).max() <= 2e-7 * y.nan_to_num(0.0).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*FLOAT32, *BFLOAT16, *FLOAT16], ids=str)
def test_passes_have_no_float64_where_it_is_slow(dtype):
    """Rows twice as long take not one instruction of it more."""

    def executed(architecture: str, d: int) -> int:
        xs = [x[7:] for x in batch(4, 15, d, (dtype,))]
        call = xs, None, None, 0.3, True, True, spec.ALIGNMENT_MEAN | spec.U | spec.W
        door = cuda.door(8, 8, architecture=architecture)
        with ptx.counting(str) as opcodes:
            outputs, state = door.forward(*call)
            door.backward(*call, state, [outputs[0], None, *outputs[2:]], [True] * 4)
            door.backward(*call, state, [outputs[0], *(None for _ in outputs[1:])], [True] * 4)
        return sum(count for opcode, count in opcodes.items() if ".f64" in opcode)

    assert executed(SLOW_FLOAT64, 256) == executed(SLOW_FLOAT64, 128) > 0
    assert executed("sm_90", 256) > 1.2 * executed("sm_90", 128)


Take = Callable[[Sequence[Any], object], list[Any]]


@pytest.fixture
def take(request: pytest.FixtureRequest) -> Take:
    """Of some cases of a test those that ``--sample`` asks for; others with each ``--seed``."""
    share, seed = (request.config.getoption(name) for name in ("--sample", "--seed"))
    return lambda cases, of: draw(cases, share, f"{seed}{of}")


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4, 5, 6, 7, 8])
def test_kernels_of_every_k(k, take, request):
    architectures = ARCHITECTURES
    if request.config.getoption("--sample") > 1:  # each compiles for a while
        architectures = draw(ARCHITECTURES, len(ARCHITECTURES), f"{request.config.getoption('--seed')}{k}")
    for architecture in architectures:
        for layout, name in take([*itertools.product(LAYOUTS.values(), CASES)], k):
            check(cuda.door(*layout, architecture=architecture), k, name)
        assert k == 8 or not CALLS_OR_STACK.search(cuda.compiled(k, architecture))


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 4])
def test_the_same_bits_whoever_is_beside(k):
    """An instance alone, in a batch, by either layout's order of sums: lanes do not read one another's instances."""
    xs = batch(k, 33, 24, FLOAT32)
    for layout in ((8, 4), (8, 16), (8, 3, 2), (16, 6), (16, 17, 2), (32, 9), (32, 2, 20), (32, 1)):
        door = cuda.door(*layout)
        options = None, None, 0.3, True, True, spec.ALIGNMENT | spec.SIGMA | spec.U
        together, _ = door.forward(xs, *options)
        for i in (0, 5, 32):
            alone, _ = door.forward([x[i : i + 1] for x in xs], *options)
            for x, y in zip(alone, together, strict=True):
                assert torch.equal(x[0].nan_to_num(7.0), y[i].nan_to_num(7.0))


@pytest.mark.parametrize("architecture", ["sm_90", SLOW_FLOAT64])
def test_ptx_calls_nothing_and_keeps_nothing_in_local_memory(architecture):
    assert not CALLS_OR_STACK.search(cuda.compiled(3, architecture))


@pytest.mark.slow
@pytest.mark.skipif(cuda.disassembler() is None, reason="no nvdisasm, neither CUDA's nor Triton's")
@pytest.mark.parametrize(("dtype", "elements"), [("float32", 4), ("bfloat16", 8), ("float16", 8)])
def test_what_assemblers_make_of_a_pass(dtype, elements, tmp_path):
    """16 bytes a load and a store, and one conversion of each element either way: of two packs of each of four rows,
    and of the four elements at a time that rows of no whole packs come by. Both packs are asked for twice, before the
    loop and in it."""
    opcodes = cuda.opcodes(4, "sm_90", f"backward_4_{dtype}", tmp_path)
    packs, single = 2 * 4, 4
    assert opcodes["LDG.E.128.CONSTANT"] == 2 * packs
    assert sum(n for x, n in opcodes.items() if x.startswith("STG") and x.endswith("128")) == packs
    assert opcodes["F2F.F64.F32"] == packs * elements + single + 1  # and what comes in for the alignment term
    assert opcodes["F2F.F32.F64"] == packs * elements + single
    assert not [x for x in opcodes if x.startswith(("LDL", "STL"))]


MISTAKES = {
    "a barrier left out": ("  __syncwarp();\n  Sums found", "  Sums found", ptx.RaceError),
    "the sum of a block before all are there": ("  __syncthreads();\n", "", ptx.RaceError),
    "a bound left out": (
        "  if (i >= b.B) return;\n  const auto kept = [&](int at",
        "  const auto kept = [&](int at",
        ptx.MemoryFaultError,
    ),
}
MISTAKES_OF_ROUNDS = {
    "a round that is not waited for": ("    meet();\n    const Forward", "    const Forward", ptx.RaceError),
    "one place for all rounds": ("[kApart] = kept[round & 1]", "[kApart] = kept[0]", ptx.RaceError),
    "copies that are not waited for": ("wait_for_copies<kPacks - 2>", "wait_for_copies<kPacks - 1>", AssertionError),
    "a place that copies come to too soon": (
        "        copy_next((slot + kPacks - 1) % kPacks);  // where the packs before these were\n",
        "        copy_next((slot + 1) % kPacks);\n",
        AssertionError,
    ),
}


MISTAKES_IN_PAIRS = {
    "no rounding errors of products": (
        "__fmaf_rn(a, b, -product) + lost",
        "lost",
        lambda: test_pairs_are_nearly_as_exact_as_float64(2),
    ),
    "norms that are too small": (
        "square > kLeastSquareOfPairs",
        "square >= 0.0f",
        lambda: test_what_pairs_have_no_numbers_for("everything", 1e-20),
    ),
    "products that are too small": (
        "kLeastProductOfPairs = 0x1p-90",
        "kLeastProductOfPairs = 0.0",
        lambda: test_incoming_gradients_that_pairs_have_no_numbers_for(1e-15, 1e-27, True),
    ),
    "others in float64, too": (
        "exists = r < count && wanted >> r & 1",
        "exists = r < count",
        lambda: test_the_same_bits_in_pairs_whoever_is_beside(0.0),
    ),
    "rounding errors that turn a v": (
        "? 16 : 2048)",
        "? 16 : 16)",
        lambda: test_sums_of_equal_terms_in_pairs(4096, (32, 4)),
    ),
}


def replaced(folder: Path, old: str, new: str) -> Path:
    """A copy of the sources with one mistake."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (source,) = [x for x in (folder / "csrc").rglob("*.*") if old in x.read_text()]
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    return folder / "csrc"


def test_what_is_kept_is_of_these_sources(tmp_path, monkeypatch):
    """Or mistakes would not be seen: of other ones, or with other options, it is made anew."""
    monkeypatch.setattr(kept, "PLACE", tmp_path / "place")
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "found").touch()

    old, new, *_ = next(iter(MISTAKES.values()))
    places = {kept.kept("some", make, csrc=folder) for folder in (ROOT / "csrc", replaced(tmp_path, old, new)) * 2}
    assert len(places) == len(made) == 2
    assert kept.kept("some", make, "-g") not in places
    assert all((place / "found").exists() for place in places)
    with pytest.raises(ZeroDivisionError):
        kept.kept("none", lambda folder: 1 / 0)
    assert not list((tmp_path / "place").glob("none-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MISTAKES, *MISTAKES_OF_ROUNDS, *MISTAKES_IN_PAIRS])
def test_mistakes_raise(name, tmp_path, monkeypatch):
    """What the agreement above is worth: with a barrier or a bound left out there is none."""
    old, new, *how = (MISTAKES | MISTAKES_OF_ROUNDS | MISTAKES_IN_PAIRS)[name]
    monkeypatch.setattr(cuda, "CSRC", replaced(tmp_path, old, new))
    monkeypatch.setattr(cuda, "compiled", functools.cache(cuda.compiled.__wrapped__))
    if name in MISTAKES_IN_PAIRS:
        with pytest.raises(AssertionError):
            how[0]()
        return
    (error,) = how
    door, k, case = (cuda.door(8, 4), 3, "everything") if name in MISTAKES else (cuda.door(8, 4, 2), 4, "long rows")
    with pytest.raises(error):
        check(door, k, case)


@pytest.mark.slow
def test_resources_are_those_of_the_table(take):
    """For every architecture: a kernel that takes more than it did is seen where it is reviewed (`make resources`)."""
    written = cuda_resources.TABLE.read_text()
    assert cuda_resources.table([]).splitlines()[0] == written.splitlines()[0], "another nvcc: rewrite the table"
    table = cuda_resources.rows_of(written)
    kinds = {"backward", "forward", "vectors", "dots", "apply", "coefficients", "decompose", "total", "slope"}
    cells = [*itertools.product(cuda_resources.ARCHITECTURES, cuda.KS)]
    for architecture, k in take(cells, "resources"):
        rows = [*cuda_resources.compiled(architecture, k)]
        assert {row.kernel.split("_")[0] for row in rows} == kinds | ({"stream"} if k in (4, 5) else set())
        assert rows == [row for row in table.values() if (row.target, row.k) == (architecture, k)]
        assert not [told for row in rows for told in cuda_resources.faults(row)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_87", "sm_89", "sm_103"])
def test_kernels_compile_for_other_cards(architecture, tmp_path):
    """Those that a build may name."""
    command = cuda.command(4, architecture, "-cubin", "-o", str(tmp_path / "kernels.cubin"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_reads_as_it_was_written():
    rows = cuda_resources.rows_of(cuda_resources.TABLE.read_text())
    assert cuda_resources.rows_of(cuda_resources.table(rows.values())) == rows
    assert {(target, k) for target, k, _ in rows} == {(x, k) for x in cuda_resources.ARCHITECTURES for k in cuda.KS}


def test_faults_of_kernels_are_found():
    row = cuda_resources.Row("sm_90", 7, "forward_7", 255, 0, 0, 48 << 10, None)
    assert not cuda_resources.faults(row)
    for fault in ({"spilled": 4}, {"stack": 8}, {"shared": (48 << 10) + 8}):
        assert len(cuda_resources.faults(row._replace(**fault))) == 1
    assert not cuda_resources.faults(row._replace(spilled=32, stack=32, k=8))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", SLOW_FLOAT64])
def test_a_sample_of_the_contract(architecture, sampled):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.tools.cuda_door",
            "tests/contract",
            "-k",
            "cuda",
            *sampled(48, "--every"),
        ],
        cwd=ROOT,
        env={**os.environ, "PMRL_DOOR_ARCHITECTURE": architecture},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
