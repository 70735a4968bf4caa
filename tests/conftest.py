"""What every test shares: the backends and devices of this machine, and poisoned memory."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from pmrl_kernels import losses, ops
from tests.tools.samples import draw

# What they assert tells its values, as in tests.
pytest.register_assert_rewrite("tests.tools.arguments", "tests.tools.scalars")
# Programs and helpers, some of which need what is not everywhere; and what needs an environment of its own, which
# `make integrations` asks for by name.
collect_ignore = ["tools", "integrations"]

losses._warned_of_floor = True  # small batches are below it; its own test asks for it
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
LAUNCHES = {  # the largest batch of the latency layout, that of a spread solve, and how dot products are summed
    "triton-latency": (1 << 30, 1 << 30, "float64"),
    "triton-throughput": (0, 0, "float64"),
    "triton-double-float": (4, 1 << 30, "float32"),
}


def _runs(variant: str, device: str) -> bool:
    backend = ops.available[variant.partition("-")[0]]
    return backend.rejects(torch.device(device), torch.float32, 3, 64) is None


# Every backend that works here: a new one joins the suite by working. Triton's kernels come in several forms.
VARIANTS = [v for name in ops.available for v in (LAUNCHES if name == "triton" else (name,))]
ON_A_CPU = [v for v in VARIANTS if _runs(v, "cpu")]
CPU_BACKENDS = tuple(dict.fromkeys(v.partition("-")[0] for v in ON_A_CPU))

if "triton-latency" in ON_A_CPU:
    from tests.tools import interpreter

    interpreter.hasten()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` and ``device`` together take the pairs that go together; ``backend`` alone, what runs on a CPU."""
    marked: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        marked.update(mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    wanted = {"backend", "device"} & set(metafunc.fixturenames) - marked
    if wanted == {"backend", "device"}:
        pairs = [(v, device) for v in VARIANTS for device in DEVICES if _runs(v, device)]
        metafunc.parametrize(("backend", "device"), pairs, indirect=["backend"])
    elif wanted == {"backend"}:
        metafunc.parametrize("backend", ON_A_CPU, indirect=True)
    elif wanted == {"device"}:
        metafunc.parametrize("device", DEVICES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="of Triton's tests, one in so many")
    parser.addoption("--every-k", action="store_true", help="on a CPU, too: else, from one in 10 on, no k > 8 of these")
    parser.addoption("--every", type=int, default=1, help="of all tests, one in so many")
    parser.addoption(
        "--sample", type=int, default=1, help="N: slow tests that run suites take N times fewer; of others, 1 in log2 N"
    )
    parser.addoption("--seed", default="", help="which tests these are: any word, such as a commit")
    parser.addoption("--unpoisoned", action="store_true", help="leave memory uninitialised, for tools that look for it")


def pytest_report_header(config: pytest.Config) -> str:
    return "sample: " + ", ".join(f"{name} {config.getoption(name)}" for name in ("--sample", "--every", "--seed"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Hardly any of it becomes garbage, and looking for some among thousands of tests takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture
def sampled(request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """Arguments of a pytest process that takes one in so many tests, fewer with ``--sample``; others with each seed."""

    def arguments(share: int, option: str = "--one-in") -> list[str]:
        config = request.config
        return [option, str(share * config.getoption("--sample")), f"--seed={config.getoption('--seed')}"]

    return arguments


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where kernels are interpreted, or compiled for every test, a sample must do."""
    share, every, seed = (config.getoption(name) for name in ("--one-in", "--every", "--seed"))
    of_slow = max(1, config.getoption("--sample").bit_length() - 1)
    least = "triton-latency" in ON_A_CPU and share >= 10 and not config.getoption("--every-k")
    alike = defaultdict(list)  # by the share that is drawn of them
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        k, variant = params.get("k", 2), params.get("backend")
        # The kernels of the latency layout; and contrasts have one alone.
        repeats = variant in ("triton-throughput", "triton-double-float") and (k > 8 or "contrast_op" in item.nodeid)
        if "triton-latency" in ON_A_CPU and "threads" in item.name:
            repeats = True  # the interpreter serves one thread at a time
        one_in = every
        # Of slow tests that run no suite, a third with --sample 8.
        if item.get_closest_marker("slow") and "sampled" not in item.fixturenames:
            one_in *= of_slow
        if variant in (*LAUNCHES, "triton"):
            if repeats or (k > 8 and least):
                continue
            one_in *= share
        alike[one_in].append(item)

    kept = {item for one_in, some in alike.items() for item in draw(some, one_in, seed, lambda item: item.nodeid)}
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Uninitialised memory holds NaN, so an output element nobody wrote shows."""
    if request.config.getoption("--unpoisoned"):
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_hoard_on_a_gpu() -> Iterator[None]:
    """Several processes share one, and what PyTorch keeps for later in one of them is out of the others' reach."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Of devices that are not there, ``torch.manual_seed`` would keep the call for later, with a stack of its text."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture
def matmul_precision() -> Iterator[Callable[[str], None]]:
    """``torch.set_float32_matmul_precision``, for the test alone: "none" and "ieee" are the same."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in LAUNCHES:
        from pmrl_kernels.ops.spectral.triton import launch
        from pmrl_kernels.ops.triton import runtime

        largest, spread, sums = LAUNCHES[request.param]
        monkeypatch.setattr(launch, "LATENCY_BATCH", largest)
        monkeypatch.setattr(launch, "SPREAD_BATCH", spread)
        monkeypatch.setattr(runtime, "SUMS", sums)
    return request.param.partition("-")[0]
