"""csrc/cuda/spectral.cpp: what the host makes of its arguments, and what it launches."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import compilation
from pmrl_kernels.ops.spectral import spec
from tests import ROOT
from tests.tools import cuda_door as cuda
from tests.tools.installation import COMPILER

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
runs_kernels = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALL = spec.ALIGNMENT | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W
WANTED = [wanted for wanted in range(1, 256) if (wanted & spec.ANY_ALIGNMENT).bit_count() < 2]


def rows(k: int, B: int = 5, d: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shared = torch.randn(B, d)
    return [(shared + torch.randn(B, d)).to(dtype) for _ in range(k)]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected)) and len(found) == len(expected)


def gradients(door: cuda.Door, *call: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What comes out, and what comes back from all of that."""
    outputs, state = door.forward(*call)
    return outputs, door.backward(*call, state, [x.cos() for x in outputs], [True] * len(call[0]))


# ---- without kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 8])
def test_states_are_as_large_as_their_fakes(k):
    """Which is written in two languages."""
    door = cuda.door(runs=False)
    for dtype, normalize, spectrum, wanted in itertools.product(DTYPES[:2], (True, False), (True, False), WANTED):
        call = rows(k, 0, 8, dtype), None, None, 0.3, normalize, spectrum, wanted
        expected = cuda.forward_shapes(*call)
        for found, fake in zip(door.forward(*call), expected, strict=True):
            assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in fake]
    assert {name for name, *_ in door.launches} == {"total"}  # of nobody, too, there is a sum


def launched(door: cuda.Door, B: int, k: int, dtype: torch.dtype, *options: Any) -> set[str]:
    """Kernels of a forward and a backward pass, none of which runs."""
    door.launches.clear()
    gradients(door, [torch.empty(B, 4, dtype=dtype)] * k, None, *options)
    return {name for name, *_ in door.launches}


@pytest.mark.parametrize("k", [3, 8])  # of 4 and 5 see below
def test_warm_up_launches_every_kernel_of_any_batch(k):
    """What has not been loaded when a CUDA graph is captured is an error there."""
    door, tau = cuda.door(runs=False), torch.tensor(0.5)
    for wanted, spectrum in itertools.product((spec.ALIGNMENT_MEAN, spec.ALIGNMENT, spec.U | spec.W), (True, False)):
        options = tau, 0.3, True, spectrum, wanted
        ready = set().union(*(launched(door, B, k, torch.float32, *options) for B in compilation._BATCHES))
        for B in (1, 5, 33, 150, 4225, 20000):
            assert launched(door, B, k, torch.float32, *options) <= ready


CAPTURED = """
from ctypes import c_int
import torch
from pmrl_kernels import compilation
from pmrl_kernels.ops.spectral import spec
from tests import ROOT
from tests.tools import cuda_door as cuda
door = cuda.door(runs=False)
capturing = c_int.in_dll(door.driver, "capturing")
for k in (4, 5):
    def forward(B, d):
        return door.forward([torch.empty(B, d)] * k, None, None, 0.3, True, True, spec.ALIGNMENT_MEAN)
    door.launches.clear()
    forward(2, 64)  # by one block
    capturing.value = 1
    for B in (5, 400, 5000, 20000):
        forward(B, 64)
    print(sorted({name for name, *_ in door.launches}))
    capturing.value = 0
"""


def test_one_call_loads_what_others_launch():
    """In a process of its own: here all kernels may have been loaded."""
    done = subprocess.run([sys.executable, "-c", CAPTURED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str([f"forward_{k}_float32", f"stream_{k}_float32", "total"]) for k in (4, 5)]


FIRST = """
from ctypes import c_int
import torch
from pmrl_kernels.ops.spectral import spec
from tests.tools import cuda_door as cuda
door = cuda.door(runs=False)
c_int.in_dll(door.driver, "capturing").value = 1
try:
    door.forward([torch.empty(5, 64)] * 3, None, None, 0.3, True, True, spec.ALIGNMENT_MEAN)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


def test_a_first_call_while_a_graph_is_captured():
    """Says what to do instead, as it does on a card."""
    done = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True, timeout=300)
    told = "total is not loaded yet, and cannot be while a CUDA graph is captured; call pmrl_kernels.warm_up"
    assert told in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("capability", "streams"),
    [
        (80, (5,)),
        (86, ()),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((87, ()), (90, (4, 5)), (100, (4, 5)))),
    ],
)
def test_rounds_are_for_cards_that_hold_their_blocks(capability, streams):
    """Which have 228 KB of shared memory as 9.0 has, or 164 as 8.0, for k = 5, not 100 as 8.6; and for code that has
    them: what runs on 8.7 is that of 8.6. In a process of its own, which asks its card once."""
    environment = {**os.environ, "PMRL_CAPABILITY": str(capability)}
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for k, line in zip((4, 5), done.stdout.splitlines(), strict=True):
        assert (f"stream_{k}_float32" in line) == (k in streams)


@pytest.mark.parametrize(
    ("B", "k", "d", "dtype", "kernel"),
    [
        (65536, 4, 8, torch.float32, "stream_4_float32"),
        (65536, 4, 8, torch.bfloat16, "stream_4_bfloat16"),
        (65536, 4, 8, torch.float16, "stream_4_float16"),
        (65536, 5, 8, torch.float32, "stream_5_float32"),
        (12672, 4, 8, torch.float32, "forward_4_float32"),  # 24 for each of four blocks of 132 multiprocessors
        (12673, 4, 8, torch.float32, "stream_4_float32"),
        (65536, 5, 8, torch.bfloat16, "forward_5_bfloat16"),
        (65536, 4, 7, torch.float32, "forward_4_float32"),  # rows of no whole packs
        (65536, 4, 8, torch.float64, "forward_4_float64"),
        (65536, 3, 8, torch.float32, "forward_3_float32"),
        (65536, 6, 8, torch.float32, "forward_6_float32"),
    ],
)
def test_large_batches_come_in_rounds(B, k, d, dtype, kernel):
    door = cuda.door(runs=False)
    door.forward([torch.empty(B, d, dtype=dtype)] * k, None, None, 0.3, True, True, spec.ALIGNMENT)
    ((name, blocks, threads),) = door.launches
    assert (name, threads) == (kernel, 64 if k == 6 else 128)
    if kernel.startswith("stream"):
        assert blocks <= 132 * (4 if k == 4 else 2)  # as many as there is room for at once


def test_which_kernels_run():
    """One pass over the embeddings each way, where nothing but the alignment term is wanted."""
    door = cuda.door(runs=False)
    assert launched(door, 9, 3, torch.float32, None, 0.3, True, True, spec.ALIGNMENT_MEAN) == {
        "forward_3_float32", "total", "backward_3_float32"
    }  # fmt: skip
    assert launched(door, 2, 8, torch.float64, None, 0.3, True, True, spec.ALIGNMENT_MEAN) == {
        "forward_8_float64", "backward_8_float64"
    }  # fmt: skip
    assert launched(door, 9, 3, torch.bfloat16, torch.tensor(0.5), 0.3, True, False, spec.ALIGNMENT | spec.U) == {
        "forward_3_bfloat16", "vectors_3_bfloat16",
        "decompose_3", "dots_3_bfloat16", "coefficients_3", "apply_3_bfloat16", "slope",
    }  # fmt: skip
    assert not launched(door, 0, 3, torch.float32, None, 0.3, True, True, ALL)
    assert launched(door, 0, 3, torch.float32, None, 0.3, True, True, spec.ALIGNMENT_MEAN) == {"total"}


B, D = 20, 7
NONSENSE: dict[str, dict[str, Any]] = {
    "no embeddings": {"xs": []},
    "one embedding": {"xs": [torch.ones(B, D)]},
    "9 embeddings": {"xs": [torch.ones(B, D)] * 9},
    "9 in a stack": {"xs": [torch.ones(B, 9, D)]},
    "33 embeddings": {"xs": [torch.ones(B, D)] * 33},
    "other rows": {"xs": [torch.ones(B, D), torch.ones(5, D)]},
    "other columns": {"xs": [torch.ones(B, D), torch.ones(B, 5)]},
    "a stack beside a matrix": {"xs": [torch.ones(B, 3, D), torch.ones(B, D)]},
    "one dimension": {"xs": [torch.ones(D)] * 3},
    "four dimensions": {"xs": [torch.ones(2, 2, 2, 2)]},
    "rows of 2^30": {"xs": [torch.ones(1).expand(1, 1 << 30)] * 3},
    "integers": {"xs": [torch.ones(B, D, dtype=torch.int64)] * 3},
    "eight bits": {"xs": [torch.ones(B, D).to(torch.float8_e4m3fn)] * 3},
    "a mask of floats": {"mask": torch.ones(B, 3)},
    "a mask of another size": {"mask": torch.ones(B, 2, dtype=torch.bool)},
    "a mask in one dimension": {"mask": torch.ones(B, dtype=torch.bool)},
    "temperatures": {"tau": torch.ones(3)},
    "two reductions": {"wanted": 6},
    "a flag that is none": {"wanted": 1024},
    "no state": {"state": lambda s: []},
    "one state": {"state": lambda s: s[:1]},
    "a short state": {"state": lambda s: [s[0][:5], s[1]]},
    "short sums": {"state": lambda s: [s[0], s[1][:2]]},
    "a state in float32": {"state": lambda s: [s[0].float(), s[1]]},
    "a state without storage": {"state": lambda s: [s[0][:1, :1].expand(s[0].shape), s[1]]},
    "a state by columns": {"state": lambda s: [s[0].T.contiguous().T, s[1]]},
    "too few needed": {"needed": [True]},
    "too many needed": {"needed": [True] * 4},
    "too few gradients": {"grads": lambda g: g[:-1]},
    "too many gradients": {"grads": lambda g: [*g, g[-1]]},
    **{
        f"gradient {i} {name}": {"grads": lambda g, i=i, wrong=wrong: [*g[:i], wrong(g[i]), *g[i + 1 :]]}
        for i in (0, 1, 2, 3, 4, 7)
        for name, wrong in {
            "in float64": lambda x: x.double(),
            "of fewer instances": lambda x: x[:2],
            "with another dimension": lambda x: x[None],
        }.items()
    },
}


@pytest.mark.parametrize("wrong", NONSENSE.values(), ids=NONSENSE.keys())
def test_operators_called_with_nonsense_raise(wrong):
    """Before anything is launched."""
    door = cuda.door(runs=False)
    xs = wrong.get("xs", [torch.ones(B, D)] * 3)
    options = wrong.get("mask"), wrong.get("tau"), 0.5, True, True, wrong.get("wanted", ALL)
    if not {"state", "needed", "grads"} & {*wrong}:
        with pytest.raises(RuntimeError, match=r"pmrl_kernels: " if xs else "no tensor arguments"):
            door.forward(xs, *options)
    else:
        outputs, state = door.forward(xs, *options)
        state, grads = (wrong.get(name, lambda x: x)(x) for name, x in (("state", state), ("grads", outputs)))
        door.launches.clear()
        with pytest.raises(RuntimeError, match=r"pmrl_kernels: "):
            door.backward(xs, *options, state, grads, wrong.get("needed", [True] * 3))
    assert not door.launches


# ---- with kernels -------------------------------------------------------------------------------


def forms(xs: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same embeddings in other places."""
    B, d = xs[0].shape
    yield [torch.stack(xs, 1)]
    yield [torch.stack(xs, 2).transpose(1, 2)]
    yield [x.T.contiguous().T for x in xs]
    yield [torch.cat([x.new_zeros(B, 3), x, x], 1)[:, 3 : 3 + d] for x in xs]  # rows of no whole packs
    yield [xs[0], *(x.repeat_interleave(2, 0)[::2] for x in xs[1:])]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_forms_of_embeddings(dtype):
    xs, mask = rows(3, 5, 16, dtype), torch.rand(5, 3) > 0.3
    options = mask, None, 0.5, True, True, spec.ALIGNMENT_SUM | spec.U
    door = cuda.door()
    outputs, slopes = gradients(door, xs, *options)
    for form in forms(xs):
        found, through = gradients(door, form, *options)
        through = list(through[0].unbind(1)) if len(form) == 1 else through
        torch.testing.assert_close(found, outputs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(through, slopes, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)
        assert all(x.is_contiguous() for x in through) or len(form) == 1


@runs_kernels
def test_forms_of_the_rest():
    """Masks, temperatures and incoming gradients of any strides and dtypes."""
    xs, mask, tau = rows(3), torch.rand(5, 3) > 0.3, torch.tensor(0.5)
    door = cuda.door()
    wanted = spec.ALIGNMENT | spec.SIGMA | spec.U | spec.V
    call = xs, mask, tau, 0.1, True, True, wanted
    outputs, state = door.forward(*call)
    grads = [x.cos() for x in outputs]
    expected = door.backward(*call, state, grads, [True] * 3)
    assert expected[-1].dtype == torch.float64
    odd = [torch.stack([x, x], -1)[..., 1] for x in grads]
    assert same_bits(door.backward(*call, state, odd, [True] * 3), expected)
    for m in (mask.T.contiguous().T, mask.repeat(1, 2)[:, :3]):
        assert same_bits(door.forward(xs, m, *call[2:])[0], outputs)
    for dtype in DTYPES:
        assert same_bits(door.forward(xs, mask, tau.to(dtype), *call[3:])[0], outputs)
    assert same_bits(door.forward(xs, mask, None, 0.5, *call[4:])[0], outputs)


@runs_kernels
def test_gradients_that_nobody_needs_or_that_do_not_come_in():
    xs, tau = rows(3), torch.tensor(0.5)
    door = cuda.door()
    call = xs, None, tau, 0.1, True, True, spec.ALIGNMENT_MEAN | spec.V
    outputs, state = door.forward(*call)
    grads = [x.cos() for x in outputs]
    expected = door.backward(*call, state, grads, [True] * 3)
    for needed in itertools.product((True, False), repeat=3):
        found = door.backward(*call, state, grads, list(needed))
        assert [x.shape for x in found[:-1]] == [x.shape if want else (0,) for x, want in zip(xs, needed, strict=True)]
        wanted = [i for i in range(4) if i == 3 or needed[i]]
        assert same_bits([found[i] for i in wanted], [expected[i] for i in wanted])
    for nothing in door.backward(*call, state, [None, None], [True] * 3):
        assert not nothing.any()
    *through_v, slope = door.backward(*call, state, [None, grads[1]], [True] * 3)
    assert not slope.any()
    assert all(x.any() for x in through_v)


@runs_kernels
@pytest.mark.parametrize("wanted", [spec.ALIGNMENT_SUM, spec.ALIGNMENT_MEAN | spec.U])
def test_a_bad_temperature_shows_where_there_are_no_instances(wanted):
    """In a sum of none, and in the temperature's gradient."""
    door, xs = cuda.door(), rows(3, 0)
    for tau, expected in ((0.5, 0.0), (torch.nan, torch.nan), (torch.inf, torch.nan), (-1.0, torch.nan)):
        (loss, *_), (*_, slope) = gradients(door, xs, None, torch.tensor(tau), 0.3, True, True, wanted)
        assert str(loss.item()) == str(slope.item()) == str(expected)


@runs_kernels
def test_the_same_bits_again():
    xs, mask, tau = rows(3, 40), torch.rand(40, 3) > 0.3, torch.tensor(0.5)
    call = xs, mask, tau, 0.1, True, True, spec.ALIGNMENT_MEAN | spec.SIGMA
    for layout in ((8, 4), (32, 1)):
        first, second = (gradients(cuda.door(*layout), *call) for _ in range(2))
        assert all(map(same_bits, first, second))


def samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of the forward operator, with a sum in each: where there is none, nobody writes those of the state."""
    everything = ALL - spec.ALIGNMENT + spec.ALIGNMENT_MEAN
    xs, mask, tau = rows(3, 4, 6), torch.tensor([[1, 1, 1]] * 3 + [[0, 1, 1]]).bool(), torch.tensor(0.5)
    yield xs, None, None, 0.5, True, True, spec.ALIGNMENT_MEAN
    yield [x.to(dtype) for x, dtype in zip(xs, DTYPES[1:], strict=True)], mask, tau, 1.0, True, True, everything
    yield [torch.stack(xs, 1)], mask, tau.bfloat16(), 1.0, False, False, everything - spec.V
    yield [torch.stack(xs, 2).transpose(1, 2).half()], None, None, 0.5, True, False, spec.ALIGNMENT_SUM
    yield [x[:0] for x in xs], None, tau, 0.5, True, True, everything


@runs_kernels
@pytest.mark.parametrize("index", range(5))
def test_opcheck(index):
    """Schema, aliasing and mutation, fake against real outputs, and tracing with dynamic shapes."""
    door, sample = cuda.door(), [*samples()][index]
    outputs, state = door.forward(*sample)
    for name, arguments in {
        "spectral_forward": sample,
        "spectral_backward": (*sample, state, [None, *outputs[1:]], [True] * len(sample[0])),
    }.items():
        result = torch.library.opcheck(getattr(door.operators, name).default, arguments)
        assert set(result.values()) == {"SUCCESS"}
