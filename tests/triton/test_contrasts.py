"""Fused contrasts: as exact as float32 with every precision, size of tiles and number of strips.

They need a GPU, Triton's interpreter or the interpreter of compiled kernels; processes that have one are started by
test_interpreted.py and test_ptx.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pmrl_kernels import ops

if "triton" not in ops.available:
    pytest.skip("needs Triton, and a GPU or an interpreter", allow_module_level=True)

import triton
import triton.language as tl

from pmrl_kernels.ops.contrast import reference, spec
from pmrl_kernels.ops.contrast.triton import kernels, launch
from pmrl_kernels.ops.triton import runtime
from pmrl_kernels.ops.triton.arguments import Temperature, bits, targets

if not torch.cuda.is_available() and ops.available["triton"].rejects(torch.device("cpu"), torch.float32, 3, 64):
    pytest.skip("needs a GPU or an interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT64 = torch.float64
each_contrast = pytest.mark.parametrize("contrast", spec.NAMES)


@pytest.fixture
def tiles(monkeypatch) -> Iterator[None]:
    """Sets their size."""

    def of(tile: int, room: int = launch.ROOM, resident: int = launch.RESIDENT, depth: int = 64) -> None:
        plan = launch.Plan(tile, 8 if tile == 128 else 4, 8, 64 if runtime.INTERPRETED else 1, 32, depth)
        monkeypatch.setattr(launch, "plan", lambda *_: plan)
        monkeypatch.setattr(launch, "ROOM", room)
        monkeypatch.setattr(launch, "RESIDENT", resident)

    yield of
    torch.set_float32_matmul_precision("highest")


def clustered(count: int, N: int, d: int) -> list[Tensor]:
    """Around N / 8 centres."""
    centres = torch.randn(max(1, N // 8), d, dtype=FLOAT64)
    return [centres[torch.arange(N) % len(centres)] + 0.3 * torch.randn(N, d, dtype=FLOAT64) for _ in range(count)]


def cone(count: int, N: int, d: int) -> list[Tensor]:
    """Around one direction, as embeddings of many models are."""
    axis = 2 * torch.randn(d, dtype=FLOAT64)
    return [axis + torch.randn(N, d, dtype=FLOAT64) for _ in range(count)]


def random(count: int, N: int, d: int) -> list[Tensor]:
    return [torch.randn(N, d, dtype=FLOAT64) for _ in range(count)]


ROWS = {"clustered": clustered, "cone": cone, "random": random}


class Found(NamedTuple):
    loss: Tensor
    losses: Tensor
    gradients: list[Tensor]
    slope: Tensor


def computed(contrast: str, vectors: list[Tensor], mask: Tensor | None, tau: float, by=launch) -> Found:
    """With gradients of −3 times the loss. ``by`` the launches, or the reference."""
    V = len(vectors)
    kind = spec.kind(contrast, {"leading": 1, "modality": V - 1, "leave_one_out": V // 2, "pairs": V}[contrast])
    t = torch.tensor(tau, dtype=FLOAT64, device=DEVICE)
    arguments = vectors, kind.pairs, kind.directions, mask, [], None, 0, t, 1.0
    forward, backward = (by.forward, by.backward) if by is launch else (by.paired_forward, by.paired_backward)
    loss, losses, state = forward(*arguments)
    gradients, slope = backward(*arguments, losses, state, torch.tensor(-3.0, device=DEVICE))
    return Found(loss, losses, gradients, slope)


def unit(rows: list[Tensor]) -> list[Tensor]:
    """In float32."""
    return [normalize(x, dim=1).float().to(DEVICE) for x in rows]


def number_of_vectors(contrast: str, k: int) -> int:
    return spec.kind(contrast, k).vectors(k)


def across(contrast: str, x: Tensor, vector: Tensor) -> Tensor:
    """Of a gradient what counts: a positive that is 1 by definition has none along its vector."""
    if contrast != "leading":
        return x
    return x - (x * vector).sum(1, keepdim=True) * vector


def errors(contrast: str, found: Found, expected: Found, vectors: list[Tensor], tau: float) -> tuple[float, ...]:
    """Of the loss, of gradients (largest to largest) and of the slope, relative; of a slope whose terms cancel, to what
    the loss is over τ."""
    loss = float((found.loss.double() - expected.loss).abs() / expected.loss)
    size = max(float(expected.slope.abs()), float(expected.loss) / tau)
    slope = float((found.slope - expected.slope).abs()) / size
    worst = 0.0
    for x, y, v in zip(found.gradients, expected.gradients, vectors, strict=True):
        x, y = across(contrast, x.double(), v.double()), across(contrast, y, v.double())
        worst = max(worst, float((x - y).abs().max() / y.abs().max()))
    return loss, worst, slope


@each_contrast
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tau", [0.02, 0.05, 0.1])
def test_as_exact_as_float32(contrast, rows, tau):
    """As what PyTorch makes of products in float32: within a part of a millionth, or of what these are off by."""
    vectors = unit(ROWS[rows](number_of_vectors(contrast, 2), 96, 48))
    expected = computed(contrast, [x.double() for x in vectors], None, tau, reference)
    ours = errors(contrast, computed(contrast, vectors, None, tau), expected, vectors, tau)
    plain = errors(contrast, computed(contrast, vectors, None, tau, reference), expected, vectors, tau)
    assert ours[0] <= 1e-6 + 2 * plain[0]
    assert ours[1] <= 3e-6 + plain[1]
    assert ours[2] <= 1e-6 + 2 * plain[2]


@each_contrast
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_one_product_where_precision_may_be_reduced(contrast, rows, precision, tiles):
    """As torch.set_float32_matmul_precision says: similarities to 2⁻¹² or so, which temperatures magnify."""
    tau = 0.05
    vectors = unit(ROWS[rows](number_of_vectors(contrast, 2), 96, 48))
    expected = computed(contrast, [x.double() for x in vectors], None, tau, reference)
    torch.set_float32_matmul_precision(precision)
    off = errors(contrast, computed(contrast, vectors, None, tau), expected, vectors, tau)
    assert off[0] <= 1e-3
    assert 1e-5 < off[1] <= 2.0**-12 / tau
    assert off[2] <= 2.0**-12 / tau


@each_contrast
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_tiles_and_strips_change_nothing(contrast, tau, tiles):
    """One tile; several; and strips of one row of tiles, whose weights go way by way."""
    torch.manual_seed(1)
    N = 100
    vectors = unit(random(number_of_vectors(contrast, 3), N, 20))
    for x in vectors:
        x[::7] = 0
    mask = None
    if contrast == "modality":
        mask = (torch.rand(N, 3) < 0.8).to(DEVICE)
        for m in range(3):
            vectors[1 + m][~mask[:, m]] = torch.nan
    results = []
    for tile, room, resident in ((128, 1 << 26, 4224), (32, 1 << 26, 4224), (32, 1, 1), (32, 3 * 32 * 128, 64)):
        tiles(tile, room, resident)
        results.append(computed(contrast, vectors, mask, tau))
    for other in results[1:]:
        torch.testing.assert_close(other.loss, results[0].loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(other.losses, results[0].losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.slope, results[0].slope, rtol=1e-5, atol=0)
        for x, y in zip(other.gradients, results[0].gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=5e-7 / tau * float(y.abs().max()))
            assert torch.equal(x == 0, y == 0)


@each_contrast
def test_batches_of_several_processes_in_strips(contrast, tiles):
    """Of 70 rows, 20 before and 30 behind a process's own, in weights of one row of tiles, and all at once."""
    N, here, tau = 70, slice(20, 40), torch.tensor(0.1, device=DEVICE)
    vectors = unit(random(number_of_vectors(contrast, 3), N, 20))
    tiles(32)
    whole = computed(contrast, vectors, None, 0.1)
    kind = spec.kind(contrast, 3)
    own = [x[here] for x in vectors]
    arguments = own, kind.pairs, kind.directions, None, vectors, None, here.start, tau, 1.0
    for room in (1 << 26, 1):
        tiles(32, room, 1)
        _, losses, state = launch.forward(*arguments)
        torch.testing.assert_close(losses, whole.losses[..., here], rtol=1e-5, atol=1e-6)
        found, _ = launch.backward(*arguments, whole.losses, state, torch.tensor(-3.0, device=DEVICE))
        for x, y in zip(found, whole.gradients, strict=True):
            torch.testing.assert_close(x, y[here], rtol=0, atol=5e-6 * float(y.abs().max()))


@triton.jit
def similarities_kernel(prepared, s, k, width, sizes, FORM: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Of vectors 0 and 1, all of them (tiles·TILE, tiles·TILE)."""
    at = tl.program_id(0)
    tile = kernels.tile_of(k * 0, at, sizes, kernels.Strip(0 * at, sizes.tiles), FORM, TILE, 8)
    found = kernels.similarities(prepared, tile, k, width, sizes, FORM, TILE, DEPTH)
    length = (sizes.tiles * TILE).to(tl.int32)
    rows, columns = tile.I * TILE + tile.lane, tile.J * TILE + tile.lane
    tl.store(s + rows[:, None] * length + columns[None, :], found)


@pytest.mark.parametrize("rows", ROWS)
def test_similarities_have_the_same_bits_in_all_tiles(rows, tiles):
    """Of whole numbers, whose sums are exact however they are added up, and of small ones added up in one order."""
    N, d = 128, 100
    vectors = unit(ROWS[rows](2, N, d))
    vectors[0][5] = vectors[1][5]
    found = []
    for tile in (32, 64, 128):
        tiles(tile)
        problem = launch.Problem(vectors, (0, 1), (True, True), None, [], None, 0, None, 0.1)
        call = launch.geometry(problem)._replace(kept=False)
        made = launch._prepare(call, problem, vectors[0])
        s = torch.full((N, N), torch.nan, device=DEVICE)
        values = (made, s, call.k, call.width, call.sizes)
        warps = 8 if tile == 128 else 4
        programs = (N // tile) ** 2
        parameters = call.form, tile, call.plan.depth
        runtime.run(runtime.Launch(similarities_kernel, programs, warps, values, parameters, (2, 4, 1, 64, 1)))
        found.append(s)
    assert all(torch.equal(found[0], s) for s in found[1:])
    exact = vectors[0].double() @ vectors[1].double().T
    assert float((found[0] - exact).abs().max()) <= 1.8e-7
    plain = float(((vectors[0] @ vectors[1].T) - exact).abs().max())
    assert float((found[0] - exact).abs().max()) <= max(2 * plain, 1.3e-7)


@pytest.mark.parametrize(("tile", "depth"), [(64, 64), (128, 64), (128, 32)])
def test_larger_tiles(tile, depth, tiles):
    """Of which four warps make products together on some cards."""
    tiles(tile, depth=depth)
    for contrast, tau in (("pairs", 0.05), ("leading", 0.1)):
        vectors = unit(clustered(number_of_vectors(contrast, 2), tile + 9, 40))
        expected = computed(contrast, [x.double() for x in vectors], None, tau, reference)
        off = errors(contrast, computed(contrast, vectors, None, tau), expected, vectors, tau)
        assert max(off) <= 3e-6


def in_parts(x: Tensor, padded: int, width: int) -> Tensor:
    """Rows (N, d) as ``prepare_kernel`` writes them, (3, padded, width)."""
    scaled = torch.zeros(padded, width, device=DEVICE)
    scaled[: len(x), : x.shape[1]] = 4092 * x
    whole = scaled.round()
    return torch.stack([whole, scaled - whole, scaled]).half()


@pytest.mark.slow
@pytest.mark.parametrize("tile", [32, 128])
def test_a_product_over_many_rows(tile, tiles):
    """K = 65536. An accumulator that is cut, not rounded, would lose 3e-4 of it (with sums of one sign, as here): it is
    rounded at the end of each tile."""
    tiles(tile)
    n, N, tau = tile, 65536, 0.5
    b, G = unit(cone(1, N, 16))[0], torch.rand(n, N, device=DEVICE)
    own = [b[:n], b[:n]]
    call = launch.geometry(launch.Problem(own, (0, 1), (True, True), None, [b, b], None, 0, None, tau))
    padded, made = call.sizes.padded, call.layout._replace(buffer=torch.zeros(call.numbers, device=DEVICE).double())
    halves, octets = made.buffer.view(torch.float16), made.buffer.view(torch.int8)
    parts = halves[4 * made.parts :][: 2 * 3 * padded * call.width].view(2, 3, padded, call.width)
    parts.copy_(in_parts(b, padded, call.width))
    octets[8 * made.flags :][:N] = kernels.COUNTED.value | 3 * kernels.SEEN.value
    high = (8192 * G).half()
    weights = torch.stack([high, (8192 * G - high).half()]).expand(1, 2, n, N).contiguous()
    scales = torch.full((1, 1, N // tile), 2.0**-13, device=DEVICE)
    losses = torch.zeros(2, 1, N, dtype=FLOAT64, device=DEVICE)  # nothing is pulled to its partner
    found = torch.full((n, 16), torch.nan, device=DEVICE)
    one, fixed = torch.ones((), dtype=FLOAT64, device=DEVICE), Temperature(None, bits(tau))
    step = launch.Pass(call, made, fixed, losses, one, one.float(), *targets([found], 16), [])
    launch._product(step, kernels.Strip(0, 1), (weights, scales))
    expected = G.double() @ b.double() / tau
    assert float((found - expected).abs().max() / expected.abs().max()) <= 3e-6


@pytest.mark.slow
def test_gradients_of_many_rows(tiles):
    """The same by way of all kernels."""
    tiles(32)
    n, N = 32, 65536 if DEVICE == "cuda" else 8192
    (x,) = unit(cone(1, N, 16))
    arguments = [x[:n]], (0, 0), (True,), None, [x], None, 0, None, 0.5
    _, losses, state = launch.forward(*arguments)
    wide = [x[:n].double()], (0, 0), (True,), None, [x.double()], None, 0, None, 0.5
    whole = reference.paired_forward([x.double()], (0, 0), (True,), None, [], None, 0, None, 0.5)[1]
    torch.testing.assert_close(losses, whole[..., :n], rtol=1e-6, atol=0)
    (found,), _ = launch.backward(*arguments, whole, state, torch.ones((), device=DEVICE))
    (expected,), _ = reference.paired_backward(*wide, whole, state, torch.ones((), device=DEVICE))
    found, expected = (across("leading", g.double(), x[:n].double()) for g in (found, expected))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 3e-6


def test_a_row_without_a_loss_may_hold_anything(tiles):
    """NaN whose partner is not there takes part in nothing: neither in losses nor in gradients, that of τ included."""
    e, one = unit(random(3, 40, 7)), torch.ones((), device=DEVICE)
    u, a = e[0].clone(), e[1].clone()
    u[0], a[0] = 0, torch.nan
    mask = torch.ones(40, 2, dtype=torch.bool, device=DEVICE)
    star = [u, a, e[2]], (1, 0, 2, 0), (True, False, False), mask
    b, c = e[1].clone(), e[2].clone()
    b[0], c[0] = torch.nan, 0
    b[1:] = 0
    nobody = [b, c], (0, 1), (True, True), None
    for vectors, pairs, directions, present in (star, nobody):
        arguments = pairs, directions, present, [], None, 0, torch.tensor(0.1, device=DEVICE), 1.0
        for room in (1 << 26, 1):
            tiles(32, room, 1)
            loss, losses, state = launch.forward(vectors, *arguments)
            h, slope = launch.backward(vectors, *arguments, losses, state, one)
            wide = [x.double() for x in vectors]
            expected, others, kept = reference.paired_forward(wide, *arguments)
            H, S = reference.paired_backward(wide, *arguments, others, kept, one)
            assert torch.isfinite(expected)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(slope, S, rtol=1e-5, atol=0)
            for x, y in zip(h, H, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("grad", [torch.inf, -torch.inf, torch.nan, 0.0, 1e38, 1e-38])
def test_gradients_that_come_in(grad, tiles):
    """They multiply what is added up, whether that is all at once or way by way."""
    vectors = unit(random(4, 40, 7))
    vectors[1][3] = vectors[0][3] = 0
    kind = spec.kind("modality", 3)
    arguments = vectors, kind.pairs, kind.directions, None, [], None, 0, None, 0.1
    results = []
    for room in (1 << 26, 1):
        tiles(32, room, 1)
        _, losses, state = launch.forward(*arguments)
        results.append(launch.backward(*arguments, losses, state, torch.tensor(grad, device=DEVICE))[0])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.isinf(), y.isinf())
        finite = x.isfinite()
        torch.testing.assert_close(
            x[finite],
            y[finite],
            rtol=1e-4,
            atol=1e-5 * float(y[finite].abs().max().nan_to_num()) if finite.any() else 0,
        )
    assert not results[0][0][3].any()


def test_equal_rows_have_equal_similarities(tiles):
    """At temperatures that show the last bit: log N of N equal rows."""
    tiles(32)
    for d in (7, 64):
        (x,) = unit(random(1, 1, d))
        rows = [x.repeat(33, 1), x.repeat(33, 1)]
        for tau in (1e-2, 1e-6, 1e-20, 1.2e-38):
            loss, *_ = launch.forward(rows, (0, 1), (True, True), None, [], None, 0, None, tau)
            torch.testing.assert_close(loss, torch.full_like(loss, 33).log(), rtol=1e-6, atol=0)


def test_pairs_that_are_no_contrast():
    a, b, c = unit(random(3, 4, 8))
    for pairs, directions in (((0, 1), (False, False)), ((0, 1, 1, 2), (True,) * 3), ((0, 0), (False,))):
        with pytest.raises(NotImplementedError, match="pairs: got"):
            launch.forward([a, b, c][: len(directions)], pairs, directions, None, [], None, 0, None, 0.1)


def test_nobody_has_rows():
    """Of any process."""
    a = torch.empty(0, 8, device=DEVICE)
    for name in spec.NAMES:
        kind = spec.kind(name, 2)
        vectors = [a] * kind.vectors(2)
        arguments = vectors, kind.pairs, kind.directions, None, vectors, None, 0, None, 0.1
        loss, losses, state = launch.forward(*arguments)
        assert (float(loss), losses.shape[-1]) == (0.0, 0)
        found, _ = launch.backward(*arguments, losses, state, torch.ones((), device=DEVICE))
        assert all(x.shape == (0, 8) for x in found)


def test_a_state_that_was_kept_elsewhere():
    """And came back where 16 bytes do not begin."""
    vectors = unit(random(3, 9, 12))
    kind = spec.kind("modality", 2)
    arguments = vectors, kind.pairs, kind.directions, None, [], None, 0, None, 0.1
    _, losses, state = launch.forward(*arguments)
    elsewhere = torch.empty(len(state) + 1, dtype=FLOAT64, device=DEVICE)[1:].copy_(state)
    one = torch.ones((), device=DEVICE)
    for x, y in zip(*(launch.backward(*arguments, losses, s, one)[0] for s in (state, elsewhere)), strict=True):
        assert torch.equal(x, y)


def test_nothing_to_compare():
    (a,) = unit(random(1, 4, 8))
    for rows, pairs in itertools.product((4, 0), ((), (0, 0))):
        if (rows, pairs) == (4, (0, 0)):
            continue
        loss, losses, state = launch.forward([a[:rows]], pairs, (True,), None, [], None, 0, None, 0.1)
        assert (float(loss), losses.shape) == (0.0, (1, len(pairs) // 2, rows))
        (h,), slope = launch.backward(
            [a[:rows]], pairs, (True,), None, [], None, 0, None, 0.1, losses, state, torch.ones((), device=DEVICE)
        )
        assert not h.any()
        assert slope == 0
