"""The benchmark: its registry and gate, what it reports, and that it refuses where numbers would mean nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pmrl_kernels import instance_contrastive_loss, ops
from tests import ROOT
from tests.conftest import CPU_BACKENDS

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def benchmark_modules() -> Iterator[SimpleNamespace]:
    """The scripts as they see one another, in memory that is not filled with NaN, and torch's settings restored."""
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    # Not by monkeypatch, which would also undo what others appended meanwhile: setuptools keeps its own dependencies
    # on a path that it adds when it is first imported, and torch.compile imports it.
    sys.path.insert(0, str(FOLDER))
    import chunks
    import contrast
    import cpu
    import figure
    import joint
    from lib import accuracy, cases, measure, memory, ratios, run

    yield SimpleNamespace(
        accuracy=accuracy,
        cases=cases,
        chunks=chunks,
        contrast=contrast,
        cpu=cpu,
        figure=figure,
        joint=joint,
        measure=measure,
        memory=memory,
        ratios=ratios,
        run=run,
    )
    sys.path.remove(str(FOLDER))
    torch.set_num_threads(threads)


def test_every_formulation_agrees_with_a_float64_svd(benchmark_modules):
    """But for the compiled ones, which the slow test takes."""
    cases, accuracy = benchmark_modules.cases, benchmark_modules.accuracy
    checked = 0
    for contender in cases.CONTENDERS:
        case = cases.Case(32, 24, 4)
        if contender.loss is None or contender.rival == "compiled" or contender.declines(case):
            continue
        error = accuracy.agreement(contender, cases.embeddings(case, cases.GATE_COSINE))
        assert error <= contender.tolerance, contender.name
        checked += 1
    assert checked >= 6


def test_the_gate_stops_a_wrong_formula(benchmark_modules):
    """An error of a thousandth in the gradient, or a NaN, ends the program before any time is printed."""
    cases, cpu = benchmark_modules.cases, benchmark_modules.cpu
    reference = cases.named("reference")
    for spoil in (lambda loss: loss * 1.001, lambda loss: loss * torch.nan):
        wrong = dataclasses.replace(reference, loss=lambda xs, spoil=spoil: spoil(reference.loss(xs)))
        with pytest.raises(SystemExit, match="No time of a wrong result"):
            cpu.gate([wrong], [3], lambda _: None)
    assert cpu.gate([reference], [3], lambda _: None) == (reference,)


def test_a_busy_machine_is_refused_unless_forced(benchmark_modules, monkeypatch, capsys):
    cpu, run = benchmark_modules.cpu, benchmark_modules.run
    monkeypatch.setattr(run, "busy", lambda threads: ["it is being tested"])
    with pytest.raises(SystemExit, match="busy: it is being tested"):
        cpu.main(["--quick"])
    assert capsys.readouterr().out == ""


def test_what_makes_a_machine_busy(benchmark_modules, monkeypatch):
    run = benchmark_modules.run
    monkeypatch.setattr(run, "SPIN_SECONDS", 0.05)
    monkeypatch.setattr(run, "load_average", lambda: 1000.0)
    assert any("load average is 1000.0" in reason for reason in run.busy(1))
    monkeypatch.setattr(run, "load_average", lambda: 0.0)
    # of a thousand threads' processor time, one process gets a small share
    assert any("1000 busy threads" in reason for reason in run.busy(1000))


@pytest.mark.slow
def test_the_report(benchmark_modules, monkeypatch, tmp_path, capsys):
    """All sections at toy sizes, files included; the compiled formulations pass the gate too."""
    cpu, cases, accuracy = benchmark_modules.cpu, benchmark_modules.cases, benchmark_modules.accuracy
    shapes = (cases.Case(8, 16, 4), cases.Case(16, 16, 4))
    monkeypatch.setattr(cases, "CASES", shapes)
    monkeypatch.setattr(cases, "LEADING", (shapes[0], cases.Case(8, 40, 32)))
    monkeypatch.setattr(cases, "MEMORY", cases.Case(1024, 256, 4))
    monkeypatch.setattr(accuracy, "INSTANCES", 8)
    monkeypatch.setattr(accuracy, "MODALITIES", (4,))
    monkeypatch.setattr(cpu, "SECONDS", 0.2)
    monkeypatch.setattr(cpu, "SOLVER_MATRICES", 64)
    results = cpu.main(["--force", "--threads", "1", "--output", str(tmp_path)])

    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "cpu.json").read_text()) == results
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    table = [line for line in (tmp_path / "cpu.csv").read_text().splitlines() if not line.startswith("#")]
    assert len(table) == 1 + len(shapes) * len(cases.CONTENDERS)
    for name in (*(contender.column for contender in cases.CONTENDERS), "F.mse_loss", *results["conditions"]["torch"]):
        assert name in printed
    assert set(results) >= set(cpu.SECTIONS)
    for row in results["time"] + results["overhead"]:
        assert row["not_run"] if "not_run" in row else row["median_ms"] > 0
    for row in results["accuracy"]["sigma"]:
        for backend in CPU_BACKENDS:
            assert row[backend] <= 4, row
    for row in results["memory"]:
        assert row["not_run"] if "not_run" in row else row["MiB"] > 0
    if "native" in ops.available:
        memory = {row["contender"]: row["of_gradients"] for row in results["memory"]}
        assert memory["full SVD"] > 10 * memory["native"]
        assert 1 <= memory["native"] < 2


def test_ratios(benchmark_modules):
    """Means over shapes are geometric, a lost shape is named, and what was not run is no zero."""
    ratios, cases = benchmark_modules.ratios, benchmark_modules.cases
    medians = {contender.name: 8.0 for contender in cases.CONTENDERS} | {"native": 2.0, "floor": 1.0}
    rows = [
        {"B": B, "d": 4, "k": 3, "contender": name, "median_ms": ms * (8 if B == 2 and name == "native" else 1)}
        for B in (1, 2)
        for name, ms in medians.items()
    ]
    rows[0] = {"B": 1, "d": 4, "k": 3, "contender": "full SVD", "not_run": "too large"}
    found = ratios.summary(rows)
    assert found["reduced/native"] == pytest.approx({"geometric_mean": math.sqrt(2), "least": 0.5, "greatest": 4})
    assert found["eager/native"]["greatest"] == 4
    assert found["native/floor"]["greatest"] == 16
    lost = ratios.losses(rows)
    assert lost
    assert all("B=2" in line for line in lost)
    assert any("reduced SVD takes 0.50" in line for line in lost)
    assert "full SVD" not in ratios.by_shape(rows)[1, 4, 3]


def test_turns(benchmark_modules):
    """Every contender is called, quick ones many times in a turn, and single calls are single."""
    measure = benchmark_modules.measure
    counts = {"a": 0, "b": 0}

    def call(name: str) -> None:
        counts[name] += 1

    calls = {name: lambda name=name: call(name) for name in counts}
    timings = measure.interleaved(calls, 0.01)
    assert all(timing.rounds >= measure.LEAST_ROUNDS for timing in timings.values())
    assert min(counts.values()) > 20 * measure.LEAST_ROUNDS
    before = dict(counts)
    timings = measure.interleaved(calls, 0.0, turn_seconds=0.0)
    assert all(counts[name] - before[name] == timings[name].rounds + 4 for name in counts)


def test_peak_memory_is_that_of_one_call(benchmark_modules):
    """The floor's gradients and nothing else, in MiB."""
    if not (sys.platform == "linux" and Path("/proc/self/clear_refs").exists()):
        pytest.skip("needs Linux's /proc")
    found = benchmark_modules.memory.of_contender("floor", benchmark_modules.cases.Case(512, 1024, 4))
    assert 8 <= found <= 9


@pytest.mark.slow
def test_records_of_single_calls(tmp_path):
    """``make bench-record`` collects and runs; here each call once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "native"]
    done = subprocess.run([*command, str(FOLDER / "test_record.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout or "2 skipped" in done.stdout


measures_native = pytest.mark.skipif("native" not in ops.available, reason="the native contrasts are measured")


@measures_native
def test_what_is_aimed_at_on_a_gpu(benchmark_modules):
    """Ratios of the GPU benchmark's rows, against its marks; what was not measured is not judged."""
    import gpu

    measured = [
        (65536, "float32", "copy", {"wall_us": 1.0, "device_us": 250.0}),
        (65536, "float32", "triton", {"wall_us": 600.0, "device_us": 450.0}),  # the least is 375
        (65536, "bfloat16", "triton", {"wall_us": 300.0, "device_us": 300.0}),  # 187.5
        (256, "float32", "triton", {"wall_us": 200.0, "device_us": 19.0, "peak_MiB": 2.0}),
        (256, "float32", "full SVD", {"wall_us": 1e5, "peak_MiB": 300.0}),
        (256, "float32", "F.mse_loss", {"wall_us": 70.0}),
        (64, "float32", "triton", {"wall_us": 1.0}),
    ]
    rows = [{"B": B, "d": 512, "k": 4, "dtype": dtype, "contender": name} | r for B, dtype, name, r in measured]
    assert gpu.marks(rows, gpu.bandwidth_of_copy(rows)) == [
        "triton, (65536, 512, 4), float32: device time over the least: 1.20, wanted <= 1.3: met",
        "triton, (65536, 512, 4), bfloat16: device time over the least: 1.60, wanted <= 1.45: MISSED",
        "triton, (256, 512, 4): eager wall over F.mse_loss: 2.86, wanted <= 3: met",
        "triton, (256, 512, 4): device µs: 19.0, wanted <= 20: met",
        "triton, (256, 512, 4): full SVD's wall over it: 500, wanted >= 1000: MISSED",
        "triton, (256, 512, 4): peak memory 2.00 MiB, full SVD 300 MiB",
    ]
    assert gpu.marks(rows[:1], 1.0) == []


class Slow:
    """A clock of calls that take half a second for each of their instances, whatever they are."""

    device = "cpu"

    def __init__(self):
        self.B = 0

    def work(self, xs):
        self.B = len(xs[0])

    def wait(self):
        pass

    def seconds(self, call, times):
        call()
        return 0.5 * self.B

    def median(self, call, once):
        return once


def test_no_gpu_waits_for_what_is_too_slow(benchmark_modules):
    """The next shape is 128 times as large as the last one that was timed."""
    import gpu

    clock = Slow()
    slow = benchmark_modules.cases.Contender("slow", "slow", work=clock.work)
    wanted = [([(2, 4, 3), (256, 4, 3)], torch.float32, [slow])]
    first, second = gpu.times(wanted, clock, float("inf"))
    assert first["wall_us"] == 1e6
    assert second["not_run"] == "expected to take 128 s a call"
    assert [row["not_run"] for row in gpu.times(wanted, clock, 0.0)] == ["no time was left"] * 2


def test_a_slow_call_is_timed_once(benchmark_modules):
    """And one that is quick, in rounds."""
    import gpu

    calls = []

    def call(seconds):
        calls.append(seconds)
        time.sleep(seconds)

    clock = gpu.Clock("cpu")
    assert clock.median(lambda: call(0.0), once=0.25) == 0.25
    assert calls == []
    clock.median(lambda: call(0.02), once=0.02)
    assert len(calls) == 8


def test_what_matters_of_contrasts_is_timed_first(benchmark_modules):
    """Small batches before large ones, and no compiler before what needs none."""
    import gpu_contrast

    shapes = [(B, 512, 4) for B in gpu_contrast.BATCHES]
    found = gpu_contrast.work(gpu_contrast.contenders(False), shapes)
    assert [[B for B, _, _ in some] for some, _, _ in found] == [[256, 1024, 4096]] * 2 + [[16384, 65536]] * 2
    names = [[one.name for one in who] for _, _, who in found]
    assert names[2:] == names[:2]
    assert names[0][:7] == [
        "instance", "F.cross_entropy", "F.cross_entropy, high", "pmrl, leading", "pmrl, leave_one_out",
        "pmrl, modality", "pmrl, pairs",
    ]  # fmt: skip
    assert names[1] == ["F.cross_entropy, compiled", "F.cross_entropy, compiled, high"]


def test_the_gate_of_contrasts_on_a_gpu(benchmark_modules):
    """Who is wrong or raises is named, once, and the others are timed."""
    import gpu_contrast

    def raises(xs):
        raise RuntimeError("no kernel\nmore")

    plain = gpu_contrast._of_one("F.cross_entropy", gpu_contrast._cross_entropy)
    wrong = gpu_contrast._of_one("F.cross_entropy, compiled", lambda xs: 2 * gpu_contrast._cross_entropy(xs))
    broken = gpu_contrast._of_one("instance", raises)
    refused = []
    wanted = [([(7, 12, 3)], torch.float32, [plain, wrong, broken])] * 2
    for _, _, passed in gpu_contrast.gated(wanted, gpu_contrast.Clock("cpu"), refused):
        assert passed == [plain]
    assert refused == [
        "F.cross_entropy, compiled: its gradient is 1.0e+00 from the reference in float64 at B = 7: not timed",
        "instance: RuntimeError: no kernel",
    ]


def test_the_gate_of_the_gpu_benchmark(benchmark_modules):
    """A rival that is wrong is left out and named; if we are, there is nothing to be timed."""
    import gpu

    right = benchmark_modules.cases.named("reference")
    wrong = dataclasses.replace(right, name="rival", loss=lambda xs: right.loss(xs) * 1.01)
    kept, left_out = gpu.gate([right, wrong], gpu.Clock("cpu"), True)
    assert kept == [right]
    assert re.fullmatch(r"rival is 1\.0e-02 from float64 at B=3,d=20,k=3 in torch\.float32", left_out[0])
    with pytest.raises(SystemExit, match=r"triton is 1\.0e-02 from .* Nothing is timed"):
        gpu.gate([dataclasses.replace(wrong, name="triton")], gpu.Clock("cpu"), True)


@pytest.mark.parametrize("what", ["leading", "triplet"])
def test_what_has_no_loss_passes_the_gate_of_the_gpu_benchmark_too(benchmark_modules, what):
    """By its gradients, in float32 and bfloat16; in layouts that only large batches have, too."""
    import gpu

    (right,) = (one for one in gpu._ours("reference") if one.name == f"reference, {what}")
    for error, dtype in ((1e-4, torch.float32), (1e-1, torch.bfloat16)):

        def step(xs, error=error, dtype=dtype):
            return [(1 + error * (x.dtype == dtype)) * g for x, g in zip(xs, right.step(xs), strict=True)]

        wrong = dataclasses.replace(right, work=step)
        kept, left_out = gpu.gate([right, wrong], gpu.Clock("cpu"), True)
        assert kept == [right]
        assert left_out[0].endswith(f"in {dtype}")
    large = dataclasses.replace(right, work=lambda xs: [g * (1 + (len(xs[0]) > 4096)) for g in right.step(xs)])
    _, left_out = gpu.gate([large], gpu.Clock("cpu"), False)
    assert "at B=13312,d=256,k=4 in torch.float32" in left_out[0]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_price_of_an_ordinary_loss_is_that_of_all_embeddings(benchmark_modules, k):
    import gpu

    xs = [torch.randn(5, 4, requires_grad=True) for _ in range(k)]
    assert [g.abs().min() > 0 for g in gpu._squared_error(xs)] == [True] * k


@pytest.mark.slow
def test_the_check_on_a_gpu_can_be_rehearsed(tmp_path):
    """Time on a GPU is too dear for typing errors: every step that can, runs on the CPU at toy sizes."""
    pytest.importorskip("triton", reason="Triton has no packages for this system")
    arguments = ["--dry-run", "--output", str(tmp_path), "--one-in", "1000", "--limit", "2000"]
    command = [sys.executable, str(FOLDER / "gpu_check.py"), *arguments, "--only"]
    done = subprocess.run(
        [
            *(*command, "facts", "fused", "gpu", "contract", "contract-cuda", "benchmark", "contrasts", "host"),
            *("tune", "tune-contrasts"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} >= {
        "gpu-check.log", "gpu.json", "gpu.csv", "gpu-contrast.json", "tune.json", "tune-contrast.json",
    }  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".running", ".cue", ".ready", ".half")]
    log = (tmp_path / "gpu-check.log").read_text()
    assert re.findall(r"(?m)^== (\S+): passed, ", log)[-4:] == ["contrasts", "tune", "tune-contrasts", "host"]
    tuned = json.loads((tmp_path / "tune.json").read_text())
    assert {row["kernel"] for row in tuned["kernels"]} >= {"gram_kernel", "solve_kernel", "forward_kernel"}
    settings = json.loads((tmp_path / "tune-contrast.json").read_text())["settings"]
    assert all({"all", "prepare_kernel", "similar_kernel", "weights_kernel"} <= row["us"].keys() for row in settings)
    unknown = subprocess.run([*command, "facts", "fact"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "--only: got ['fact'], wanted some of" in unknown.stderr


@pytest.mark.slow
def test_a_step_of_the_check_that_takes_too_long_tells_what_has_failed(benchmark_modules, tmp_path):
    """And leaves nothing behind that would go on."""
    import gpu_check

    child = tmp_path / "child"
    (tmp_path / "test_some.py").write_text(
        "import pathlib, subprocess, time\n"
        "def test_one():\n    assert 1 == 2, 'what is wrong'\n"
        "def test_two():\n"
        f"    pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '300']).pid))\n"
        "    time.sleep(300)\n"
    )
    step = gpu_check.Step(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_some.py")], 60)
    began = time.monotonic()
    status, text = gpu_check.run(step, 10.0, dict(os.environ))
    assert status == 124
    assert time.monotonic() - began < 60
    assert "what is wrong" in text, text
    assert "interrupted after" in text
    left = Path(f"/proc/{child.read_text()}/stat")
    while left.exists() and left.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() - began < 60
        time.sleep(0.1)


def test_the_profiler_is_told_the_names_of_kernels(benchmark_modules):
    """As they are compiled: of the CUDA backend's, some for each dtype and some for all."""
    import gpu_check

    pattern = gpu_check.OUR_KERNELS.removeprefix("regex:")
    table = (ROOT / "tests" / "data" / "cuda-resources.txt").read_text()
    compiled = {line.split()[2] for line in table.splitlines() if not line.startswith("#")}
    each = [f"{name}_4_{dtype}" for name in ("forward", "stream", "backward") for dtype in ("float32", "bfloat16")]
    of_alignment = {*each, "vectors_4_float32", "total"}
    assert of_alignment <= compiled
    names = of_alignment | {f"{name}_kernel" for name in ("gram", "solve", "vectors", "forward", "reduce", "backward")}
    assert not [name for name in names if not re.fullmatch(pattern, name)]
    assert not re.fullmatch(pattern, "vectorized_elementwise_kernel")


def steps_of(gpu_check: Any, only: Sequence[str], **options: Any) -> dict[str, Any]:
    given = {"dry_run": False, "output": FOLDER, "one_in": None, "wheel": None, "kernels": None, **options}
    return {name: x for name, x in gpu_check.steps(SimpleNamespace(only=only, **given)).items() if name in only}


def test_steps_of_the_check_on_a_gpu(benchmark_modules, monkeypatch, tmp_path):
    """Who waits for whom, how many processes they have, and what is new comes first."""
    import gpu_check

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    every = steps_of(gpu_check, gpu_check.DEFAULT)
    assert list(every) == list(gpu_check.DEFAULT)
    assert {name for name, step in every.items() if gpu_check.CUE in step.arguments} == {"benchmark", "contrasts"}
    left = 16 - 3 - 2  # by sanitizers, and benchmarks that wait
    assert [gpu_check.workers(name, gpu_check.DEFAULT) for name in gpu_check.TESTS] == [2, 4, 3, 2]
    assert sum(gpu_check.TESTS.values()) == left
    assert gpu_check.workers("fused", ["fused"]) == 16
    shares = {name: step.arguments for name, step in every.items() if name.startswith("contract")}
    assert shares["contract"][-3:] == ["--one-in", "32", "tests/contract"]
    assert shares["contract-cuda"][-5:-3] == ["--every", "24"]
    assert steps_of(gpu_check, ["contract-cuda"], one_in=1)["contract-cuda"].arguments[-5:-3] == ["--every", "1"]
    archive = tmp_path / "kernels.tar.xz"
    archive.with_suffix(".txt").write_text("tests/contract/test_a.py::test_b[x y]\n")
    told = steps_of(gpu_check, gpu_check.DEFAULT, kernels=archive)
    assert told["contract"].arguments[-1] == "tests/contract/test_a.py::test_b[x y]"
    assert "-k" not in told["contract"].arguments
    assert "--compiled" in told["benchmark"].arguments


def test_rivals_are_compiled_beforehand(benchmark_modules, monkeypatch):
    """One call for each graph, the first that is timed before the others; of contrasts one for each shape."""
    import gpu
    import gpu_contrast

    for program in (gpu, gpu_contrast):
        monkeypatch.setattr(program, "embeddings", lambda case, **_: [torch.empty(case.B, 1)] * case.k)

    def told(calls: Iterator[Any]) -> list[tuple[str, int, int]]:
        return [(x.func.__self__.name, len(x.args[0][0]), len(x.args[0])) for x in calls]

    found = told(gpu.compiled_rivals(gpu.work(gpu.contenders(False), False), "cpu"))
    names = list(dict.fromkeys(name for name, *_ in found))
    assert len(names) == 2
    assert found[:4] == [(name, B, 4) for name in names for B in (64, 1024)]
    assert len(found) == len(set(found)) == 2 * 2 * 3  # names, small and large, k = 3, 4, 6
    shapes = [(B, 16, 3) for B in gpu_contrast.BATCHES[:2]]
    calls = list(gpu_contrast.compiled_rivals(gpu_contrast.contenders(False), shapes, "cpu"))
    assert {(B, k) for _, B, k in told(iter(calls))} == {(300, 4), (256, 3), (1024, 3)}
    assert len(calls) == 6


def test_kernels_that_come_along_are_put_where_they_were(benchmark_modules, tmp_path):
    import gpu_check

    def archive(*names: str) -> Path:
        path = tmp_path / "kernels.tar.xz"
        with tarfile.open(path, "w:xz") as tar:
            for name in names:
                entry = tarfile.TarInfo(str((tmp_path / name).relative_to("/")))
                entry.size = 3
                tar.addfile(entry, io.BytesIO(b"abc"))
        return path

    assert gpu_check.unpack(archive("cache/a/x.cubin", "cache/b/y.json")) == tmp_path / "cache"
    assert (tmp_path / "cache" / "b" / "y.json").read_bytes() == b"abc"
    with pytest.raises(SystemExit, match=r"with .*elsewhere/x\.cubin, wanted files of one cache alone, .*/cache"):
        gpu_check.unpack(archive("cache/a/x.cubin", "elsewhere/b/elsewhere/x.cubin"))
    with pytest.raises(SystemExit, match="with nothing in it"):
        gpu_check.unpack(archive())


SIDE_BY_SIDE = """
import sys, time
from pathlib import Path
name, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"{name}.begun").touch()
if name == "timed":
    cue = Path(sys.argv[3])
    while not cue.exists():
        time.sleep(0.01)
    cue.with_suffix(".ready").touch()
    while not (told := cue.read_text()):
        time.sleep(0.01)
    print("told", told, "after", *sorted(x.stem for x in folder.glob("*.ended")))
else:
    other = {"one": "other", "other": "one"}[name]
    while not all((folder / f"{x}.begun").exists() for x in (other, "timed")):
        time.sleep(0.01)
(folder / f"{name}.ended").touch()
sys.exit(name == "other")
"""


def test_steps_run_side_by_side_and_then_what_is_timed_alone(benchmark_modules, tmp_path, capsys):
    """Each of these waits for the others to begin. A failure of one is told, and keeps nobody from running."""
    import gpu_check

    output = tmp_path / "output"
    output.mkdir()

    def step(name: str, *more: str, beside: bool) -> Any:
        return gpu_check.Step(["-c", SIDE_BY_SIDE, name, str(tmp_path), *more], 1.0, beside)

    chosen = {"one": step("one", beside=True), "other": step("other", beside=True)}
    chosen["timed"] = step("timed", gpu_check.CUE, beside=False)
    report = gpu_check.run_all(chosen, 100.0, os.environ, output)
    assert report.failed == ["other"]
    assert report.last() == 1
    log = (output / "gpu-check.log").read_text()
    told = re.search(r"told (\S+) after one other", log)
    assert 60 < float(told[1]) - time.time() <= 85
    assert re.findall(r"(?m)^== (\w+): (\w+)", log)[-1] == ("timed", "passed")
    assert {path.name for path in output.iterdir()} == {"gpu-check.log"}
    assert "failed: other; " in capsys.readouterr().out
    alone = gpu_check.run_all({"timed": chosen["timed"]}, 20.0, os.environ, output)
    assert not alone.failed, "nobody is there to wait for"


def test_what_is_exact_to_float32_passes_the_gate_of_contrasts(benchmark_modules):
    """At batches as large as on a GPU, ours and PyTorch's own alike."""
    import gpu_contrast
    from lib import objectives
    from lib.accuracy import doubled

    xs = gpu_contrast.gate_embeddings(benchmark_modules.cases.Case(4096, 64, 2, "cpu"))
    doubles = doubled(xs)
    losses = [lambda xs: objectives.instance_contrast(xs[0], 0.1), lambda xs: instance_contrastive_loss(xs[0], 0.1)]
    for loss in losses:
        (found,), (wanted,) = (torch.autograd.grad(loss(given), given[:1]) for given in (xs, doubles))
        assert (found.double() - wanted).abs().max() < 0.5 * gpu_contrast.TOLERANCE["highest"] * wanted.abs().max()


def test_what_waits_for_its_turn_has_all_of_its_time(benchmark_modules, tmp_path):
    """However long it waited."""
    from lib import on_gpu

    cue = tmp_path / "cue"

    def calls() -> Iterator[Any]:
        time.sleep(1.0)
        cue.write_text(str(time.time() + 5.0))
        yield lambda: pytest.fail("it is its turn")

    end = on_gpu.wait_for(cue, calls())
    assert 4.5 < end - time.monotonic() <= 5.0
    assert cue.with_suffix(".ready").exists()


@pytest.mark.slow  # a rival is compiled
def test_the_contrasts_benchmark(benchmark_modules, monkeypatch, tmp_path, capsys):
    """Every section once, at toy sizes: its rows, their baselines, and what is written."""
    contrast, cases = benchmark_modules.contrast, benchmark_modules.cases
    monkeypatch.setattr(contrast, "INSTANCES", (cases.Case(64, 16, 1),))
    monkeypatch.setattr(contrast, "MODALITIES", (cases.Case(64, 16, 3),))
    monkeypatch.setattr(contrast, "OBJECTIVE", cases.Case(64, 16, 3))
    monkeypatch.setattr(contrast, "LARGE", (512, 64))
    monkeypatch.setattr(contrast, "SECONDS", 0.1)
    results = contrast.main(["--force", "--output", str(tmp_path)])
    sections = [row["section"] for row in results["time"]]
    assert set(sections) == {"instance", "instance, one of two processes", "modality", "objective"}
    assert all(row["of_floor"] > 0 and row["ms"] > 0 for row in results["time"])
    assert sum(row["call"] == row["floor"] for row in results["time"]) == 4
    assert 0 < results["memory_MiB"] < 64
    assert all(row["loss"] < 1e-4 for row in results["accuracy"] if row["call"] == "native")
    assert json.loads((tmp_path / "contrast.json").read_text())["time"] == results["time"]
    assert "memory at B = 512" in capsys.readouterr().out


@measures_native
def test_the_contrasts_benchmark_stops_a_wrong_loss(benchmark_modules, monkeypatch):
    contrast = benchmark_modules.contrast
    right = contrast.objectives.reduced_svd

    def no_gradient(xs, **taus):
        loss = right(xs, **taus)
        loss.register_hook(lambda grad: grad * torch.nan)
        return loss

    for wrong, error in ((lambda xs, **taus: right(xs, **taus) * 1.01, r"1\.0e-02"), (no_gradient, "nan")):
        monkeypatch.setattr(contrast, "RIVALS", {"wrong": wrong})
        with pytest.raises(SystemExit, match=f"wrong is {error} from float64"):
            contrast.compare.gate(contrast.checks())


@pytest.mark.slow
def test_the_benchmark_of_joint_scores(benchmark_modules, monkeypatch, tmp_path, capsys):
    """Every section once, at toy sizes; what holds all pairs at once is left out where there are too many."""
    joint, cases = benchmark_modules.joint, benchmark_modules.cases
    monkeypatch.setattr(joint, "CASES", (cases.Case(64, 16, 3), cases.Case(80, 16, 4)))
    monkeypatch.setattr(joint, "PUBLISHED", tuple(p._replace(most=64 * 64) for p in joint.PUBLISHED))
    monkeypatch.setattr(joint, "LARGE", (512, 64, 3))
    monkeypatch.setattr(joint, "OF_MEMORY", ("area2",))
    monkeypatch.setattr(joint, "SCORES", ("volume", "sigma"))
    monkeypatch.setattr(joint, "SECONDS", 0.1)
    results = joint.main(["--force", "--threads", "1", "--output", str(tmp_path)])
    rows = results["time"]
    assert {row["section"] for row in rows} == {
        "scores, forward", "scores, forward + backward", "contrast", "as published, forward", "contrast, as published",
    }  # fmt: skip
    assert all(row["of_floor"] > 0 and row["ms"] > 0 for row in rows)
    assert {row["floor"] for row in rows} == {"2 products", "8 products", "3 products", "12 products"}
    published = {(row["B"], row["call"]) for row in rows} & {(B, p.name) for B in (64, 80) for p in joint.PUBLISHED}
    assert published == {(64, p.name) for p in joint.PUBLISHED}
    assert {(row["k"], row["call"]) for row in rows} >= {(3, "area2"), (4, "sigma")}
    memory = {(row["call"], row["score"]): row["MiB"] for row in results["memory"]}
    assert memory["(N, N, d): TRIANGLE", "area2"] > 64 > memory["scores", "area2"]
    assert results["conditions"]["threads"] == 1
    assert json.loads((tmp_path / "joint.json").read_text())["time"] == rows
    assert "MiB beyond embeddings" in capsys.readouterr().out


@measures_native
@pytest.mark.slow
def test_the_benchmark_of_joint_scores_stops_a_wrong_score(benchmark_modules, monkeypatch):
    joint = benchmark_modules.joint
    wrong = joint.Published("wrong", "sigma", lambda xs: 1.01 * joint.objectives.eigenvalue_sigmas(xs))
    monkeypatch.setattr(joint, "PUBLISHED", (wrong,))
    with pytest.raises(SystemExit, match=r"joint_scores, sigma is \d\.\de-0\d from float64"):
        joint.compare.gate(joint.checks())


def test_the_benchmark_of_chunks(benchmark_modules, capsys):
    """Eight chunks of three encoders hold little more than a twenty-fourth of what they hold at once."""
    peaks = benchmark_modules.chunks.main(["--batch", "128", "--repeats", "1"])
    assert peaks[8] < peaks[1] / 8
    printed = capsys.readouterr().out
    errors = [float(error) for error in re.findall(r"\| (\S+) \| \S+ \|$", printed, flags=re.MULTILINE)[1:]]
    assert len(errors) == len(peaks)
    assert max(errors) < 1e-6


def test_the_figure_is_drawn_again(benchmark_modules, tmp_path, capsys):
    """From results that are kept; and what is no result is named."""
    kept = tmp_path / "cpu.json"
    kept.write_text((FOLDER / "results" / "cpu.json").read_text())
    assert benchmark_modules.figure.main([str(kept)]) == [tmp_path / "cpu.png"]
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        benchmark_modules.figure.main([str(tmp_path / "contrast.json")])
    assert "contrast.json, wanted one of cpu.json, gpu.json" in capsys.readouterr().err


@measures_native
def test_the_parts_of_a_small_call(tmp_path):
    """They add up, and each is there. In a process of its own, which tells Triton to interpret."""
    command = [sys.executable, str(FOLDER / "host.py"), "--quick", "--sections", "native", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "host.json").read_text())
    assert [row["function"] for row in results["native"]] == ["dominant_sv_loss"] * 2 + ["pmrl_loss"] * 2
    assert "triton" not in results
    for row in results["native"]:
        whole, operators, empty, both, _, forward, backward = row["parts"].values()
        assert min(whole, operators, empty) > 0
        assert whole == pytest.approx(operators + empty + both + forward + backward)
        assert row["function"] in done.stdout


@pytest.mark.slow
def test_launches_are_counted(tmp_path):
    pytest.importorskip("triton", reason="Triton has no packages for this system")
    command = [sys.executable, str(FOLDER / "launches.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "launches.json").read_text())
    assert [row["contrast"] for row in rows] == ["leading", "modality", "leave_one_out", "pairs"]
    for row in rows:
        fused, plain = row["fused"], row["PyTorch"]
        assert (fused["forward"], fused["backward"]) == (2, 2)
        assert plain["forward"] + plain["backward"] > 100
        assert 0 < 4 * fused["size"] < plain["size"]
        assert row["contrast"] in done.stdout
