"""The library's operators: opcheck, torch.compile, and callers that go around the package's own checks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_sv_loss, pmrl_loss
from pmrl_kernels.ops.contrast import native
from pmrl_kernels.ops.spectral import spec
from tests.tools import contrasts, joints
from tests.tools.backends import operators
from tests.tools.contrasts import Calls
from tests.tools.native import ALL, OPS, everything, modalities, run, same_bits, some_mask


@pytest.mark.parametrize("rows", [1, 31, 33, 192, 1447, 1449, 2047, 2048, 2049, 2896, 2897])
def test_states_of_contrasts_are_as_large_as_their_fakes(rows):
    """What is kept for the backward pass, and up to how many similarities, is written in two languages."""
    u = torch.nn.functional.normalize(torch.randn(rows, 3), dim=1)
    given = [contrasts.instances(u, others, 0, None, 0.5) for others in (None, torch.cat([u, u[:1]]))]
    given += [
        contrasts.modalities(z, u, None, others, None, 0, raw, None, 0.5)
        for z, others in (([u], []), ([u, u], []), ([u], [u, u]))
        for raw in (False, True)
    ]
    given.append(([u], [0, 0], [False], None, [], None, 0, None, 0.5))
    given.append(([u] * 4, [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3], [True] * 4, None, [], None, 0, None, 0.5))
    for arguments in given:
        assert OPS.paired_forward(*arguments)[2].shape == native._forward_shapes(*arguments)[2].shape


@pytest.mark.parametrize("contrast", ["modality", "leave_one_out", "pairs"])
@pytest.mark.parametrize("k", [3, 4, 5])
def test_threads_share_products(contrast, k):
    """With several threads each takes products of its own where they come out even; absent rows are left out."""
    xs = [x.detach() for x in modalities(k, 150, 9, torch.float32)]
    mask = torch.ones(150, k, dtype=torch.bool)
    mask[7, 0] = mask[9, 1] = False
    before, results = torch.get_num_threads(), []
    try:
        for threads, m in itertools.product((1, 2, 3, 4), (None, mask)):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in xs]
            tau = torch.tensor(0.2, requires_grad=True)
            for scale in (1.0, 1e20):
                loss = pmrl_loss(leaves, mask=m, contrast=contrast, instance_temperature=tau, backend="native")
                results.append([loss.detach(), *torch.autograd.grad(loss * scale, [*leaves, tau])])
    finally:
        torch.set_num_threads(before)
    for i, found in enumerate(results):
        # Of sums in another order, which BLAS chooses by the processor, too: a few roundings of float32.
        size = results[i % 4][1].abs().max().item()
        torch.testing.assert_close(found, results[i % 4], rtol=2e-5, atol=5e-7 * size)


@pytest.mark.parametrize("group", [False, True], ids=["one process", "of several"])
def test_a_state_is_the_same_whatever_the_number_of_threads(group):
    """The backward pass may run with another one: tiles are taller the more threads there are."""
    a, b, c = contrasts.rows(3, 300, 7, torch.float32)
    columns = contrasts.everyone([a, b, c]) if group else []
    given = [a, b, c], [0, 1, 1, 2], [True] * 3, None, columns, None, int(group), None, 0.1
    before = torch.get_num_threads()
    gradients = {}
    try:
        for first, then in itertools.product((1, 2, 8), repeat=2):
            torch.set_num_threads(first)
            _, losses, state = OPS.paired_forward(*given)
            if group:
                losses = torch.cat([losses.new_ones(2, 2, 1), losses, losses.new_ones(2, 2, 3)], 2)
            torch.set_num_threads(then)
            gradients[first, then], _ = OPS.paired_backward(*given, losses, state, torch.ones(()))
    finally:
        torch.set_num_threads(before)
    for found in gradients.values():
        torch.testing.assert_close(found, gradients[1, 1], rtol=1e-5, atol=1e-8)


def test_operators_read_masks_of_any_bytes():
    """They may be called with what inputs.py has not read: a mask's bytes are 0 or not."""
    xs, mask = [x.detach() for x in modalities(4, 37, 19, torch.float32)], some_mask(37, 4)
    odd = (mask.to(torch.uint8) * 255).view(torch.bool)
    weights = torch.linspace(0.5, 2.0, 37)
    for a, b in zip(*(everything(xs, m, True, True, weights) for m in (mask, odd)), strict=True):
        assert torch.equal(a, b)
    u, *z = (torch.nn.functional.normalize(x) for x in [xs[0], *xs])
    for raw, columns in itertools.product((False, True), ([], [u, *z])):
        found = []
        for m in (mask, odd):
            given = (z, u, None if columns else m, columns, m if columns else None, 0, raw, None, 0.1)
            loss, losses, state = Calls(operators("native")).modality_forward(*given)
            gradients, h, _ = Calls(operators("native")).modality_backward(*given, losses, state, torch.ones(()))
            found.append([loss, losses, h, *(g.masked_fill(~mask[:, j, None], 0) for j, g in enumerate(gradients))])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def forward_samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of spectral_forward: every flag both ways, forms, dtypes, masks and temperatures."""
    tau = torch.tensor(0.5)
    xs = [x.detach() for x in modalities(3, 9, 5)]
    yield xs, None, None, 0.5, True, True, spec.ALIGNMENT_MEAN
    yield xs, some_mask(9, 3), tau, 1.0, False, False, ALL
    yield xs, some_mask(9, 3), tau, 1.0, False, True, spec.ALIGNMENT_SUM
    yield [x.half() for x in xs], some_mask(9, 3), tau.half(), 1.0, False, True, ALL - spec.Z
    yield [x.double() for x in xs], some_mask(9, 3), tau.double(), 1.0, True, True, ALL
    yield [x.double() for x in xs], None, None, 0.5, False, True, spec.SIGMA | spec.Z
    yield [xs[0].double(), xs[1].bfloat16(), xs[2].half()], None, None, 0.5, True, False, ALL
    yield [x[:4, :2] for x in xs], some_mask(4, 6)[:, ::2], tau, 1.0, True, True, ALL - spec.V
    yield [torch.stack(xs, 1)], some_mask(9, 3), tau, 1.0, True, True, ALL
    yield [torch.stack(xs, 2).transpose(1, 2).bfloat16()], None, None, 0.5, True, False, spec.U
    yield [x[:0] for x in xs], None, None, 0.5, True, True, ALL
    yield [x[:0] for x in xs], None, tau, 1.0, True, True, spec.ALIGNMENT_MEAN
    yield xs[:1], None, None, 0.5, True, True, ALL
    yield [x[:, ::2] for x in xs], None, None, 0.5, True, True, ALL


def backward_samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of spectral_backward: all gradients at once, one at a time, and for some embeddings only."""
    for index, sample in enumerate(forward_samples()):
        outputs, state = OPS.spectral_forward(*sample)
        n, grads = len(sample[0]), [x.exp() for x in outputs]
        yield *sample, state, grads, [True] * n
        if index == 1:
            for only in range(len(grads)):
                some = [x if i == only else None for i, x in enumerate(grads)]
                yield *sample, state, some, [m == only for m in range(n)]
            yield *sample, state, [None if i == 4 else x for i, x in enumerate(grads)], [False] * n


SAMPLES = {
    "spectral_forward": forward_samples,
    "spectral_backward": backward_samples,
    **contrasts.samples(OPS),
    **joints.samples(OPS),
}


@pytest.mark.parametrize(("op", "sample"), [
    pytest.param(op, sample, id=f"{op}-{i}", marks=[pytest.mark.slow] if i % 2 else [])
    for op, make in SAMPLES.items() for i, sample in enumerate(make())
])  # fmt: skip
def test_opcheck(op, sample):
    """Schema, aliasing and mutation, fake against real outputs, and tracing with dynamic shapes."""
    result = torch.library.opcheck(getattr(OPS, op).default, sample)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_of_the_library_is_checked():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "pmrl_kernels::" in name}
    assert names == {*SAMPLES, "build_info", "cuda_unavailable"}


LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "dominant_sv_loss": (dominant_sv_loss, 1),
    "pmrl_loss": (pmrl_loss, 2),
}


@pytest.mark.parametrize("objective", ["softmax", "leading"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_graphs_hold_the_operators_and_no_decomposition(name, objective):
    """One graph forward and one backward, whose calls are seen; nothing of torch.linalg is left in them."""
    from functorch.compile import make_boxed_func  # slow to import, and needed here alone
    from torch._dynamo.backends.common import aot_autograd

    function, calls = LOSSES[name]
    graphs: list[list[str]] = []

    def collect(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    try:
        compiled = torch.compile(function, backend=aot_autograd(fw_compiler=collect), fullgraph=True)
        xs = modalities()
        loss = compiled(*xs, objective=objective, backend="native")
        gradients = torch.autograd.grad(loss, xs)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 2
    for graph, operator in zip(graphs, ("spectral_forward", "spectral_backward"), strict=True):
        ours = [target for target in graph if "pmrl" in target]
        assert ours.count(f"pmrl_kernels.{operator}.default") == 1
        assert len(ours) == calls
        assert not [target for target in graph if re.search("eigh|linalg|svd|bmm|while", target)]
    expected = function(*(y := modalities()), objective=objective, backend="native")
    torch.testing.assert_close(loss, expected)
    assert same_bits(gradients, torch.autograd.grad(expected, y)) or name == "pmrl_loss"


# What callers that go around the package's own checks may pass. Each in a process of its own, since the wrong
# answer to most is to read memory that is not there.
SANE = """
import os, sys, torch
import pmrl_kernels
OPS = torch.ops.pmrl_kernels
torch.set_num_threads(1)
B, d = 20, 7
x = [torch.randn(B, d) for _ in range(3)]
ALL = 1 + 8 + 16 + 32 + 64 + 128

def forward(xs=x, mask=None, tau=None, wanted=ALL):
    return OPS.spectral_forward(xs, mask, tau, 0.5, True, True, wanted)

state = forward()[1]

fewer = forward(x[:2])[1]

def backward(
    state=state, alignment=None, sigma=None, u=None, v=None, z=(None,) * 3, w=(None,) * 3, needed=(True,) * 3,
    wanted=ALL,
):
    return OPS.spectral_backward(
        x, None, None, 0.5, True, True, wanted, state, [alignment, sigma, u, v, *z, *w], list(needed))

t, C = torch.randn(3, d), torch.randn(4, 2, d)
own, here, no_columns = [0, 3, 0, 4], torch.arange(3), (torch.randn(3, 0), torch.randn(4, 2, 0))

def scores(t=t, C=C, mask=None, score=0):
    return OPS.joint_forward(t, [C], mask, score, True)

of_scores = scores()[1]

def slopes(t=t, C=C, state=of_scores, grad=torch.ones(3, 4), needed=(True, True)):
    return OPS.joint_backward(t, [C], None, 0, True, state, grad, list(needed))

def contrast(t=t, C=C, positives=here, own=own, score=0):
    return OPS.joint_contrast_forward(t, [C], None, positives, own, score, True, 0.1, None, 0.1)

_, rows, columns, of_contrast = contrast()

def contrast_slopes(t=t, C=C, rows=rows, state=of_contrast, grad=torch.ones(()), needed=(True, True)):
    return OPS.joint_contrast_backward(
        t, [C], None, here, own, 0, True, 0.1, None, 0.1, rows, columns, state, grad, False, list(needed))
"""
NONSENSE = {
    "rows beyond everyone's": "OPS.paired_forward([t], [0, 0], [True], None, [t], None, 1, None, 0.5)",
    "rows beyond all integers": "OPS.paired_forward([t], [0, 0], [True], None, [t], None, 2**63 - 1, None, 0.5)",
    "no embeddings": "forward([])",
    "other rows": "forward([x[0], x[1][:5], x[2]])",
    "other columns": "forward([x[0], x[1][:, :5], x[2]])",
    "a stack beside a matrix": "forward([torch.ones(B, 3, d), x[0]])",
    "a matrix beside a stack": "forward([x[0], torch.ones(B, 3, d)])",
    "no dimension": "forward([torch.tensor(1.0)])",
    "one dimension": "forward([torch.ones(d)])",
    "four dimensions": "forward([torch.ones(2, 2, 2, 2)])",
    "33 embeddings": "forward([x[0]] * 33)",
    "33 in a stack": "forward([torch.ones(B, 33, d)])",
    "0 in a stack": "forward([torch.ones(B, 0, d)])",
    "integers": "forward([torch.ones(B, d, dtype=torch.int64)] * 3)",
    "complex numbers": "forward([torch.ones(B, d, dtype=torch.complex64)] * 3)",
    "eight bits": "forward([torch.ones(B, d).to(torch.float8_e4m3fn)] * 3)",
    "a sparse embedding": "forward([x[0].to_sparse(), x[1], x[2]])",
    "a mask of floats": "forward(mask=torch.ones(B, 3))",
    "a mask of another size": "forward(mask=torch.ones(B, 2, dtype=torch.bool))",
    "a transposed mask": "forward(mask=torch.ones(3, B, dtype=torch.bool))",
    "a mask in one dimension": "forward(mask=torch.ones(B, dtype=torch.bool))",
    "a temperature without elements": "forward(tau=torch.ones(0))",
    "temperatures": "forward(tau=torch.ones(3))",
    "no state": "backward(state=[])",
    "two states": "backward(state=[state[0], state[0]])",
    "a short state": "backward(state=[state[0][:5]])",
    "a state in float32": "backward(state=[state[0].float()])",
    "a state in bytes": "backward(state=[state[0].to(torch.int8)])",
    "a state without storage": "backward(state=[state[0][:1, :1].expand(state[0].shape)])",
    "a state of fewer modalities": "backward(state=fewer)",
    "too few needed": "backward(needed=[True])",
    "too many needed": "backward(needed=[True] * 4)",
    "alignment in float64": "backward(alignment=torch.ones(B, dtype=torch.float64))",
    "alignment of fewer instances": "backward(alignment=torch.ones(2))",
    "alignment of none": "backward(alignment=torch.ones(0))",
    "alignment as a scalar": "backward(alignment=torch.ones(()))",
    "sigma of fewer instances": "backward(sigma=torch.ones(2, 3))",
    "sigma of fewer values": "backward(sigma=torch.ones(B, 1))",
    "sigma in one dimension": "backward(sigma=torch.ones(B))",
    "u of fewer instances": "backward(u=torch.ones(2, d))",
    "u of fewer columns": "backward(u=torch.ones(B, 2))",
    "u in one dimension": "backward(u=torch.ones(B))",
    "u in bfloat16": "backward(u=torch.ones(B, d, dtype=torch.bfloat16))",
    "v of fewer instances": "backward(v=torch.ones(2, 3))",
    "v of fewer modalities": "backward(v=torch.ones(B, 2))",
    "z of fewer instances": "backward(z=[torch.ones(2, d)] * 3)",
    "z of fewer columns": "backward(z=[torch.ones(B, 2)] * 3)",
    "z of more modalities": "backward(z=[torch.ones(B, d)] * 4)",
    "z of fewer modalities": "backward(z=[torch.ones(B, d)] * 2)",
    "w of fewer instances": "backward(w=[torch.ones(2, d)] * 3)",
    "w in float64": "backward(w=[torch.ones(B, d, dtype=torch.float64)] * 3)",
    "w of more modalities": "backward(w=[torch.ones(B, d)] * 4)",
    "a state without w": "backward(state=forward(wanted=ALL - 128)[1])",
    "a vector for a mean": "backward(alignment=torch.ones(B), wanted=ALL + 3)",
    "two reductions": "forward(wanted=6)",
    "a flag that is none": "forward(wanted=1024)",
    "queries without columns": "scores(*no_columns)",
    "modalities without columns": "OPS.joint_forward(no_columns[0], list(no_columns[1].unbind(1)), None, 0, True)",
    "triangles without columns": "scores(*no_columns, score=6)",
    "slopes without columns": "slopes(*no_columns)",
    "a contrast without columns": "contrast(*no_columns)",
    "a contrast of products without columns": "contrast(no_columns[0], no_columns[1][:, 0], score=7)",
    "slopes of a contrast without columns": "contrast_slopes(*no_columns)",
    "queries of other columns": "scores(t[:, :5])",
    "a stack of queries": "scores(t[None])",
    "32 modalities of candidates": "scores(C=torch.ones(4, 32, d))",
    "a mask of other candidates": "scores(mask=torch.ones(3, 2, dtype=torch.bool))",
    "a score that is none": "scores(score=7)",
    "triangles with a mask": "scores(mask=torch.ones(4, 2, dtype=torch.bool), score=6)",
    "triangles of one modality": "scores(C=C[:, :1], score=6)",
    "scores without a state": "slopes(state=[])",
    "a state of fewer candidates": "slopes(state=[of_scores[0][:1]])",
    "slopes of fewer queries": "slopes(grad=torch.ones(2, 4))",
    "slopes in float64": "slopes(grad=torch.ones(3, 4, dtype=torch.float64))",
    "slopes that needed does not name": "slopes(needed=[True])",
    "own rows beyond the queries": "contrast(own=[0, 4, 0, 4])",
    "own rows before the queries": "contrast(own=[-1, 3, 0, 4])",
    "own rows that end before they begin": "contrast(own=[2, 1, 0, 4])",
    "own rows of one side": "contrast(own=[0, 3])",
    "positives of fewer queries": "contrast(positives=here[:2])",
    "positives in float32": "contrast(positives=here.float())",
    "no positives, and other candidates": "contrast(positives=None)",
    "products of two vectors": "contrast(score=7)",
    "losses of fewer rows": "contrast_slopes(rows=rows[:2])",
    "losses of rows in float32": "contrast_slopes(rows=rows.float())",
    "a contrast without a state": "contrast_slopes(state=[])",
    "a contrast's state in float32": "contrast_slopes(state=[x.float() for x in of_contrast])",
    "slopes of a contrast in one dimension": "contrast_slopes(grad=torch.ones(3))",
    "slopes of a contrast that needed does not name": "contrast_slopes(needed=[True])",
}
ONE_PROCESS_EACH = """
for name, call in NONSENSE.items():
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            eval(call)
            print(f"{name}: returned", flush=True)
        except RuntimeError:
            print(f"{name}: RuntimeError", flush=True)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}", flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"{name}: died of signal {-status}", flush=True)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What became of each call."""
    done = run(
        "-c", f"{SANE}\nNONSENSE = {NONSENSE!r}\nforward(); backward(); slopes(); contrast_slopes()\n{ONE_PROCESS_EACH}"
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", NONSENSE)
def test_operators_called_with_nonsense_raise(name, answers):
    """A RuntimeError from each, and never a read of memory that is not there."""
    assert answers[name] in ("RuntimeError", "NotImplementedError")
