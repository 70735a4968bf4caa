"""Compiled kernels on a CPU: they agree with the reference, and no thread reads what another one has yet to write.

tests/tools/ptx.py interprets the PTX. It has the Triton backend take tensors of a CPU, which is decided when the
package is imported, so the tests of the backend run in processes of their own.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no packages for this system")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmrl_kernels.ops.contrast.triton.kernels import triangular
from pmrl_kernels.ops.triton import runtime
from tests.tools import driver, ptx
from tests.tools.processes import run_compiled

if runtime.INTERPRETED:
    pytest.skip("this process interprets the source of kernels, and can compile none", allow_module_level=True)

N = 64  # two warps


def run(kernel, *tensors: torch.Tensor, **constants: bool) -> None:
    signature = dict.fromkeys(kernel.arg_names[: len(tensors)], "*fp64") | dict.fromkeys(constants, "constexpr")
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": 2, "enable_fp_fusion": True}
    binary = triton.compile(ASTSource(kernel, signature, at), target=GPUTarget("cuda", 90, 32), options=options)
    ptx.execute(binary.asm["ptx"], binary.metadata.shared, 1, tensors)


@triton.jit
def reversed_kernel(x, scratch, y, BARRIER: tl.constexpr):
    at = tl.arange(0, 64)
    tl.store(scratch + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + at, tl.load(scratch + 63 - at))


@triton.jit
def overwritten_kernel(x, y, BARRIER: tl.constexpr):
    at = tl.arange(0, 64)
    a = tl.load(x + 63 - at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + at, 2.0 * a)
    tl.store(y + at, a)


@triton.jit
def beyond_kernel(x, y, SHIFT: tl.constexpr):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at + SHIFT))


@triton.jit
def nothing_left_kernel(x, y):
    at = tl.arange(0, 64)
    a = tl.load(x + at)
    b = a * 0.1
    tl.store(y + at, b - b)


def test_a_read_of_what_another_thread_writes():
    x, scratch, y = torch.randn(N, dtype=torch.float64), torch.zeros(N).double(), torch.zeros(N).double()
    run(reversed_kernel, x, scratch, y, BARRIER=True)
    assert torch.equal(y, x.flip(0))
    with pytest.raises(
        ptx.RaceError, match=r"global memory: thread \d+ of program 0 reads what thread \d+ of program 0 wrote"
    ):
        run(reversed_kernel, -x, scratch, y, BARRIER=False)


def test_a_write_where_another_thread_reads():
    x, y = torch.randn(N, dtype=torch.float64), torch.zeros(N).double()
    before = x.clone()
    run(overwritten_kernel, x, y, BARRIER=True)
    assert torch.equal(x, 2 * before.flip(0))
    with pytest.raises(ptx.RaceError, match="writes where thread"):
        run(overwritten_kernel, x, y, BARRIER=False)


def test_an_access_of_nobodys_memory():
    x, y = torch.randn(2 * N, dtype=torch.float64), torch.zeros(N).double()
    run(beyond_kernel, x, y, SHIFT=N)
    assert torch.equal(y, x[N:])
    with pytest.raises(ptx.MemoryFaultError, match="belong to nobody"):
        run(beyond_kernel, x, y, SHIFT=N + 1)


def test_compilers_fuse_what_is_written_as_nothing():
    """Why kernels do not test for NaN by x - x: where x is a product, this is what rounding took from it."""
    x, y = torch.randn(N, dtype=torch.float64), torch.zeros(N).double()
    run(nothing_left_kernel, x, y)
    assert y.abs().max() > 0
    assert y.abs().max() < 1e-15


def test_undefined_registers_show():
    """%rs2 and, for odd threads, %rs3 are never written: allowed, and no results may depend on them."""
    text = """
    .visible .entry undefined_kernel(.param .u64 undefined_kernel_param_0)
    .reqntid 32
    {
        .reg .pred %p<2>;
        .reg .b16 %rs<4>;
        .reg .b32 %r<5>;
        .reg .b64 %rd<4>;
        ld.param.b64 %rd1, [undefined_kernel_param_0];
        mov.u32 %r1, %tid.x;
        and.b32 %r2, %r1, 1;
        setp.eq.b32 %p1, %r2, 0;
        mov.b16 %rs1, 7;
        @%p1 mov.b16 %rs3, 5;
        mov.b32 %r3, {%rs1, %rs2};
        mov.b32 %r4, {%rs3, %rs1};
        mad.wide.u32 %rd2, %r1, 8, %rd1;
        st.global.v2.b32 [%rd2+0], {%r3, %r4};
        ret;
    $L__func_end0:
    }
    """
    y = torch.zeros(32, 4, dtype=torch.int16)
    ptx.execute(text, 0, 1, [y])
    assert torch.equal(y[::2], torch.tensor([[7, -1, 5, 7]], dtype=torch.int16).expand(16, 4))
    assert torch.equal(y[1::2], torch.tensor([[7, -1, -1, 7]], dtype=torch.int16).expand(16, 4))


def test_lanes_that_come_late_to_an_exchange():
    """Compilers put what is rare behind everything else. The others wait for it where values are exchanged."""
    text = """
    .visible .entry late_kernel(.param .u64 late_kernel_param_0)
    .reqntid 64
    {
        .reg .pred %p<2>;
        .reg .b32 %r<8>;
        .reg .b64 %rd<3>;
        ld.param.b64 %rd1, [late_kernel_param_0];
        mov.u32 %r1, %tid.x;
        mov.b32 %r2, %r1;
        setp.eq.b32 %p1, %r1, 25;
        @%p1 bra $L__rare;
    $L__met:
        shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [%rd2+0], {%r3};
        ret;
    $L__rare:
        mov.b32 %r2, 1000;
        bra.uni $L__met;
    $L__func_end0:
    }
    """
    y = torch.zeros(64, dtype=torch.int32)
    ptx.execute(text, 0, 1, [y])
    expected = torch.arange(64, dtype=torch.int32) ^ 1
    expected[24] = 1000
    assert torch.equal(y, expected)
    with pytest.raises(ptx.RaceError, match="0xfdffffff of the lanes of warp 0 exchange values, and name 0xffffffff"):
        ptx.execute(text.replace("bra.uni $L__met", "bar.sync 0"), 0, 1, [y])


def test_compiled_kernels_agree():
    """Both layouts and both kinds of sums, forward and backward."""
    assert run_compiled("tests/triton/test_gpu.py", "-k", "layouts_and_sums_agree and softmax") == 1


def test_tritons_launcher_passes_what_kernels_take(tmp_path):
    """Launched by Triton on a driver that has no card: grid, stream, shared memory and every argument."""
    driver.compile_driver(tmp_path / "libcuda.so.1")
    which = ("tests/triton/test_gpu.py", "-k", "whatever_a_launch_takes")
    assert run_compiled(*which, TRITON_LIBCUDA_PATH=str(tmp_path)) == 4


@pytest.mark.slow
def test_rows_that_are_not_aligned():
    """Spread one column a lane: what lanes add up of one number must come out alike in all of them."""
    which = "test_singular_values and triton-double-float and float64-2-clustered-True"
    assert run_compiled("tests/contract/test_spectral_precision.py", "-k", which) == 1


@pytest.mark.slow
def test_contrasts_on_tensor_cores_that_cut():
    """fp16 products of a warp, and of four, whose sums are not rounded."""
    which = "same_bits and cone or as_exact and 0.05-cone-modality or larger_tiles and 128-64"
    assert run_compiled("tests/triton/test_contrasts.py", "-k", which) == 3


@pytest.mark.slow
def test_joint_scores_on_tensor_cores_that_cut():
    """Products of four warps, of float32 in three parts of TF32; near copies in float64."""
    which = "test_scores and 5-64-33 and (sigma-4 or area2)"
    assert run_compiled("tests/triton/test_joint.py", "-k", which) == 2


@triton.jit
def triangular_kernel(first, second, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    i, j = triangular(at)
    tl.store(first + at, i)
    tl.store(second + at, j)


def test_pairs_are_found_by_square_roots_that_are_not_exact():
    N, programs = 128, 40
    i, j = (torch.full((N * programs,), -1, dtype=torch.int32) for _ in range(2))
    signature = {"first": "*i32", "second": "*i32", "N": "constexpr"}
    source = ASTSource(triangular_kernel, signature, {(2,): N})
    options = {"num_warps": 2, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "sqrt.approx" in binary.asm["ptx"]
    with ptx.approximating(2.0**-20):
        ptx.execute(binary.asm["ptx"], binary.metadata.shared, programs, (i, j))
    expected = [(a, b) for b in range(120) for a in range(b + 1)][: N * programs]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


@pytest.mark.slow
def test_all_contrasts_on_tensor_cores_that_cut(sampled):
    assert run_compiled("tests/triton/test_contrasts.py", "-k", "test", *sampled(7, "--every")) >= 1


@pytest.mark.slow
def test_all_joint_scores_on_tensor_cores_that_cut(sampled):
    assert run_compiled("tests/triton/test_joint.py", "-k", "test", *sampled(9, "--every")) >= 1


@pytest.mark.slow
def test_compiled_kernels_agree_with_the_reference(sampled, request):
    """All functions; k = 12 on tensor cores; several widths in one process."""
    which = "layouts_and_sums_agree or agrees_with_the_reference and 12 or one_width_after_another"
    least = 5 if request.config.getoption("--sample") == 1 else 1  # of some twenty, a sample may be few
    assert run_compiled("tests/triton/test_gpu.py", "-k", which, *sampled(1, "--every")) >= least


@pytest.mark.slow
def test_operators_run_here_too():
    """They are called where a tensor is not what its memory holds."""
    selected = "negated_views and triton-throughput-cpu-dominant_singular_value"
    assert run_compiled("tests/contract/test_shapes.py", "-k", selected) == 1


@pytest.mark.slow
def test_a_sample_of_the_contract(sampled):
    assert run_compiled("tests/contract", "-k", "triton and cpu and not oracle", *sampled(150)) >= 2
