"""Batches over several processes against one: values, gradients, DDP, compiled, and what is refused."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pmrl_kernels import (
    JointContrastiveLoss,
    PMRLLoss,
    inputs,
    instance_contrastive_loss,
    joint_contrastive_loss,
    pmrl_loss,
    uniformity,
)
from tests import ROOT, TOOLS
from tests.tools import distributed_worker as worker

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


@pytest.fixture(scope="module")
def single() -> dict[str, list[Tensor]]:
    """What one process finds, without a group."""
    return worker.everything(slice(0, worker.B), None, None)


@pytest.fixture(scope="module", params=[*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2)), 3])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What each process of a world of so many finds."""
    out = tmp_path_factory.mktemp("world") / "found.pt"
    command = [sys.executable, str(TOOLS / "distributed_worker.py"), str(out), str(request.param)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "FutureWarning" not in done.stderr
    found: list[dict[str, list[Tensor]]] = torch.load(out)
    return found


def close(found: Tensor, expected: Tensor, eps: float = 1e-12) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=eps * max(scale, 1e-3))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


GRADIENTS = worker.K + 2  # of the embeddings and the two temperatures, for each output


@pytest.mark.parametrize("case", [*worker.CASES, "float32", "world"])
def test_split_batches(world, single, case):
    """The mean over processes is the value, and what DDP averages is the gradient."""
    eps = 3e-6 if case == "float32" else 1e-12
    parts, whole = [found[case] for found in world], single[case]
    for i in range(3):
        close(sum(x[i] for x in parts) / len(parts), whole[i], eps)
    for first in range(3, len(whole), GRADIENTS):
        for m in range(worker.K):
            close(torch.cat([x[first + m] for x in parts]) / len(parts), whole[first + m], eps)
        for t in (worker.K, worker.K + 1):
            close(sum(x[first + t] for x in parts) / len(parts), whole[first + t], 10 * eps)


INSTANCE = [f"instance-{backend}-{normalize}" for backend in worker.BACKENDS for normalize in (True, False)]


@pytest.mark.parametrize("name", [*INSTANCE, "instance-world"])
def test_split_instance_contrast(world, single, name):
    parts, (loss, x, tau) = [found[name] for found in world], single[name]
    close(sum(p[0] for p in parts) / len(parts), loss)
    close(torch.cat([p[1] for p in parts]) / len(parts), x)
    close(sum(p[2] for p in parts) / len(parts), tau)


@pytest.mark.parametrize("name", worker.JOINT)
def test_split_joint_contrasts(world, single, name):
    parts, (loss, tau, *xs) = [found[f"joint-{name}"] for found in world], single[f"joint-{name}-{len(world)}"]
    close(sum(p[0] for p in parts) / len(parts), loss)
    close(sum(p[1] for p in parts) / len(parts), tau, 1e-11)
    for m, x in enumerate(xs):
        close(torch.cat([p[2 + m] for p in parts]) / len(parts), x)


@pytest.mark.parametrize("what", ["model", "chunks"])
def test_parameters_of_a_ddp_model(world, single, what):
    """Everyone ends up with the single process's gradients, learnable temperatures included; in chunks too, of which
    processes have different numbers."""
    for found in world:
        for a, b in zip(found[what][1:], single["model"][1:], strict=True):
            close(a, b)
    close(sum(found[what][0] for found in world) / len(world), single["model"][0])


@pytest.mark.parametrize("what", worker.SHARDED)
def test_sharded_parameters(world, single, what):
    """Temperatures too: their gradients are those of one process, and after steps everyone holds the same."""
    for found in world:
        for a, b in zip(found[f"sharded-{what}"], single["sharded-model"], strict=True):
            close(a, b)


@pytest.mark.parametrize("sizes", ["known", "asked"])
def test_compiled(world, single, sizes):
    """One graph where sizes are known; where processes have to ask, the graph breaks there."""
    parts, whole = [found[f"compiled-{sizes}"] for found in world], single[f"compiled-{sizes}"]
    close(sum(x[0] for x in parts) / len(parts), whole[0])
    for m in range(worker.K):
        close(torch.cat([x[1 + m] for x in parts]) / len(parts), whole[1 + m])


@pytest.mark.parametrize("name", worker.DIAGNOSTICS)
def test_diagnostics_of_everyone(world, single, name):
    """The same number on every process, however the group is told, and where one of them has it compiled."""
    for found in world:
        for value in found[name]:
            close(value, single[name][0])


REFUSALS = {
    "d": ("embeddings: got d = 5", "d = 6"),
    "d of u": ("u: got d = 5", "d = 6"),
    "d, compiled": ("embeddings: got d = 5", "d = 6"),
    "d, uniformity": ("embeddings: got d = 5", "d = 6"),
    "k": ("embeddings: got k = 3", "k = 4"),
    "dtype": ("embeddings: got dtype torch.float32", "dtype torch.float64"),
    "dtype of u": ("u: got dtype torch.float32", "dtype torch.float64"),
    "contrast": ("contrast: got 'leading'", "'modality'"),
    "normalize": ("normalize: got True", "False"),
    "score": ("score: got 'gain'", "'mip'"),
    "positives": ("positives: got None", "some"),
    "n": ("candidates: got k = 3", "k = 4"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_processes_that_differ_are_told_so(world, what):
    """All of them, before a collective whose shapes would not fit, which aborts or hangs."""
    if len(world) == 1:
        assert "refusals" not in world[0]  # there is nobody to differ from
        return
    ranks = "rank 0" if len(world) == 2 else "ranks 0, 1"
    most, one = REFUSALS[what]
    wanted = "wanted the same on every process of the group"
    for found in world:
        assert found["refusals"][what] == f"ValueError: {most} on {ranks} and {one} on rank {len(world) - 1}, {wanted}"


def test_many_processes_are_not_all_listed():
    with pytest.raises(ValueError, match="got d = 5 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 91 more and d = 6 on rank 99,"):
        inputs._same("embeddings", ["d = 5"] * 99 + ["d = 6"])


def test_a_loss_called_beside_its_sharded_model(world):
    for found in world[: len(world) if len(world) > 1 else 0]:
        assert found["refusals"]["sharded"].startswith("RuntimeError: log_excess: got a shard of it, wanted the whole")


def test_the_least_temperature_is_that_of_the_whole_batch(world, single):
    (expected,) = single["warning"]
    assert f"B = {worker.B}" in expected
    assert all(found["warning"] == [expected] for found in world)


def test_processes_may_differ_in_what_does_not_go_round(world):
    """The number of modalities beside leading vectors (as if masked), and dtypes whose results are of one dtype."""
    if len(world) == 1:
        return
    xs, mask = worker.batch()
    mask[:] = True
    last = worker.SIZES[len(world)][-1]
    mask[:-last, -1] = False
    short = torch.stack(xs, 1).float()
    short[-last:] = short[-last:].bfloat16().float()
    u = xs[0].clone()
    u[:-last] = u[:-last].float().double()
    expected = [
        pmrl_loss(xs, mask=mask, temperature=0.5),
        pmrl_loss(short, temperature=0.5),
        instance_contrastive_loss(u, 0.4, False),
    ]
    for i, (value, eps) in enumerate(zip(expected, (1e-12, 3e-6, 1e-6), strict=True)):
        close(sum(found["allowed"][i] for found in world) / len(world), value, eps)


# ------------------------------------------------------------------------------------------------
# What is refused, in one process
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_no_process_group_is_this_process_alone(world):
    assert dist.group.WORLD is None  # so passing it before there is one means the same; "world" does not
    xs, mask = worker.batch()
    first = 0
    for found, size in zip(world, worker.SIZES[len(world)], strict=True):
        rows = slice(first, first + size)
        first += size
        close(found["alone"][0], pmrl_loss([x[rows] for x in xs], mask=mask[rows]))


@pytest.mark.parametrize("module", [PMRLLoss, JointContrastiveLoss])
def test_copies_of_a_module_share_its_group(module, group):
    """As an average of models needs. A group cannot leave its process, and the error says so."""
    loss = module(temperature=0.5, learnable_temperature=True, group=group)
    xs = [torch.randn(4, 5) for _ in range(3)]
    averaged = torch.optim.swa_utils.AveragedModel(loss)
    averaged.update_parameters(loss)
    for twin in (copy.deepcopy(loss), averaged.module):
        assert twin.group is group
        assert twin.temperature is not loss.temperature
        assert torch.equal(twin(*xs), loss(*xs))
    alike = copy.copy(loss)
    assert (alike.group, alike.temperature) == (group, loss.temperature)
    assert torch.equal(alike(*xs), loss(*xs))
    assert "group of 1" in repr(loss)
    with pytest.raises(pickle.PicklingError, match=r"^group: .* state_dict"):
        pickle.dumps(loss)


def test_a_torch_without_distributed_suffices():
    """Some builds have none. Everything else imports and runs."""
    script = """
import sys, torch
del torch._C._c10d_init
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    del sys.modules[name]
import torch.distributed
assert not torch.distributed.is_available()
from pmrl_kernels import PMRLLoss, pmrl_loss
x = torch.randn(4, 3, 5, requires_grad=True)
pmrl_loss(x).backward()
try:
    PMRLLoss(group=1)
except TypeError as error:
    assert str(error).startswith("group: got int")
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_world_is_looked_up_by_every_call(tmp_path):
    """A module made before there are processes, or loaded by another one, contrasts all of those there are then."""
    x = torch.randn(4, 3, 5)
    loss = PMRLLoss(group="world", contrast="modality")
    functions = (pmrl_loss, *worker.DIAGNOSTICS.values())
    calls = [lambda: loss(x), lambda: instance_contrastive_loss(x[:, 0], group="world")]
    calls += [functools.partial(function, x, group="world") for function in functions]

    def refused() -> None:
        for call in calls:
            with pytest.raises(ValueError, match=r'^group: got "world" .* torch\.distributed\.init_process_group'):
                call()

    refused()
    for turn in range(2):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/{turn}", rank=0, world_size=1)
        try:
            for twin in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
                assert twin.group == "world"
                assert torch.equal(twin(x), pmrl_loss(x, contrast="modality"))
                assert "group='world'" in repr(twin)
            for call in calls:
                call()
        finally:
            dist.destroy_process_group()
        refused()


@pytest.mark.parametrize("bad", ["everyone", 0, object()])
def test_other_things_are_no_group(bad):
    x = torch.randn(4, 5)
    wanted = r'^group: got .*, wanted a torch\.distributed\.ProcessGroup, "world" or None'
    for call in (
        lambda: pmrl_loss(x, x, group=bad),
        lambda: instance_contrastive_loss(x, group=bad),
        lambda: PMRLLoss(group=bad),
        lambda: uniformity(x, group=bad),
    ):
        with pytest.raises(TypeError, match=wanted):
            call()


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([5], ValueError, r"local_sizes\[0\]: got 5, wanted 4"),
        ([4, 4], ValueError, r"local_sizes: got 2 numbers, wanted 1"),
        ([4.0], TypeError, r"local_sizes: got \[4\.0\], wanted a list of 1 ints"),
        (4, TypeError, r"local_sizes: got 4, wanted a list"),
        ([-4], TypeError, r"local_sizes: got \[-4\]"),
    ],
)
def test_wrong_sizes(group, sizes, error, message):
    with pytest.raises(error, match=message):
        pmrl_loss(torch.randn(4, 3, 5), group=group, local_sizes=sizes)


def test_wrong_sizes_of_queries_and_candidates(group):
    t, C, positives = torch.randn(4, 5), torch.randn(3, 2, 5), torch.tensor([0, 0, 1, 2])
    for sizes, error, message in (
        ([4], TypeError, r"local_sizes: got \[4\], wanted a list of pairs"),
        ([(4, 4)], ValueError, r"local_sizes\[0\]: got 4, wanted 3, the rows of this process"),
        ([(3, 3)], ValueError, r"local_sizes\[0\]: got 3, wanted 4"),
        ([(4, 3), (1, 1)], ValueError, "local_sizes: got 2 numbers, wanted 1"),
    ):
        with pytest.raises(error, match=message):
            joint_contrastive_loss(t, C, positives=positives, group=group, local_sizes=sizes)
    found = joint_contrastive_loss(t, C, positives=positives, group=group, local_sizes=[(4, 3)])
    assert found == joint_contrastive_loss(t, C, positives=positives)


def test_sizes_without_a_group():
    with pytest.raises(ValueError, match=r"local_sizes: got \[4\], wanted None where there is no group"):
        pmrl_loss(torch.randn(4, 3, 5), local_sizes=[4])


def test_the_module_takes_sizes(group):
    xs = torch.randn(4, 3, 5)
    assert torch.equal(PMRLLoss(group=group)(xs, local_sizes=[4]), PMRLLoss(group=group)(xs))


# Runs a script as torchrun would, and sees whether its process group, with the threads it has, outlives it.
LEFT_OVER = """
import gc, runpy, sys, weakref
import torch.distributed as dist
destroy, groups = dist.destroy_process_group, []
def watch():
    groups.append(weakref.ref(dist.group.WORLD))
    destroy()
dist.destroy_process_group = watch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert [group() for group in groups] == [None], [gc.get_referrers(group()) for group in groups]
"""
SCRIPTS = {
    "example": ["examples/train_ddp.py", "--steps", "3", "--batch", "21"],
    "compiled": ["examples/train_ddp.py", "--steps", "3", "--batch", "21", "--compile", "aot_eager"],
    "worker": ["tests/tools/distributed_worker.py", "/dev/null"],
}


@pytest.mark.parametrize("script", ["example", pytest.param("compiled", marks=pytest.mark.slow), "worker"])
def test_nothing_keeps_the_process_group(script):
    """A group that lives until the interpreter ends has threads that want it then, which aborts the process."""
    path, *arguments = SCRIPTS[script]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OVER, str(ROOT / path), *arguments],
        env={**os.environ, **rank, **where},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
