"""Backends: the resolver, the environment variable, how one is added, ``info``, and the layers of the package.

Fake backends stand in for compiled ones, so these tests say the same on every machine.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import math
import modulefinder
import os
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pmrl_kernels
from pmrl_kernels import dominant_sv_loss, info, instance_contrastive_loss, ops, pmrl_loss
from pmrl_kernels.ops import constants, native, reference, triton

PACKAGE = Path(pmrl_kernels.__file__).parent
CPU = torch.device("cpu")


def fake(name: str, rejection: str | None = None, **members: Any) -> types.SimpleNamespace:
    """A backend module that works here and takes everything, or nothing."""
    return types.SimpleNamespace(
        NAME=name, unavailable=lambda: None, rejects=lambda device, dtype, k, d: rejection, **members
    )


def run_python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -c code`` in a clean environment for this package, or for the copy in ``cwd``."""
    dropped = {"PMRL_KERNELS_BACKEND", *(("PYTHONPATH",) if cwd else ())}
    variables = {key: value for key, value in os.environ.items() if key not in dropped} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------
# choose
# ------------------------------------------------------------------------------------------------

REASONS = {"triton": "triton is not installed"}


def choose(candidates: list[Any], requested: str | None = None) -> tuple[str, str | None]:
    return ops.choose(candidates, requested, CPU, torch.float32, 3, 64, REASONS)


@pytest.mark.parametrize(
    ("rejections", "expected"),
    [
        ([None, None, None], ("a", None)),
        (["too wide", None, None], ("b", "a: too wide")),
        (["too wide", "too deep", None], ("c", "a: too wide")),
        ([None, "too deep", "too long"], ("a", None)),
    ],
)
def test_the_first_that_takes_it_is_chosen(rejections, expected):
    """With why the fastest was passed over."""
    assert choose([fake(name, reason) for name, reason in zip("abc", rejections, strict=True)]) == expected


def test_order_is_the_candidates_order():
    assert choose([fake("a"), fake("b")])[0] == "a"
    assert choose([fake("b"), fake("a")])[0] == "b"


def test_request_goes_before_order():
    assert choose([fake("a"), fake("b")], "b") == ("b", None)


def test_request_that_is_rejected_raises_with_the_reason():
    """No other one is taken in its place."""
    with pytest.raises(RuntimeError) as caught:
        choose([fake("a", "d is not a multiple of 8"), fake("b")], "a")
    for part in ("'a'", "torch.float32", "k = 3", "d = 64", "cpu", "d is not a multiple of 8"):
        assert part in str(caught.value)


def test_request_that_is_not_available_raises_with_the_reason():
    with pytest.raises(RuntimeError, match="'triton' is not available: triton is not installed"):
        choose([fake("a")], "triton")


def test_none_can_run():
    with pytest.raises(RuntimeError) as caught:
        choose([fake("a", "too wide"), fake("b", "too deep")])
    for part in ("no backend", "torch.float32", "k = 3", "d = 64", "cpu", "a: too wide"):
        assert part in str(caught.value)


def test_rejects_sees_the_problem():
    seen = []

    def rejects(*problem: Any) -> None:
        seen.append(problem)

    candidate = types.SimpleNamespace(NAME="a", unavailable=lambda: None, rejects=rejects)
    ops.choose([candidate], None, CPU, torch.bfloat16, 4, 512, {})
    assert seen == [(CPU, torch.bfloat16, 4, 512)]


def test_choose_is_pure(monkeypatch):
    """Neither the module's state nor the environment reach it, and it changes nothing."""
    candidates = [fake("a", "no"), fake("b")]
    expected = choose(candidates)
    monkeypatch.setattr(ops, "available", {})
    monkeypatch.setattr(ops, "unavailable_reasons", {})
    monkeypatch.setattr(ops, "default_name", "triton")
    monkeypatch.setenv("PMRL_KERNELS_BACKEND", "triton")
    logged = set(ops._logged)
    assert choose(candidates) == choose(candidates) == expected
    assert ops._logged == logged


# ------------------------------------------------------------------------------------------------
# resolve
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def rejecting(monkeypatch) -> None:
    """A faster backend that works here but not for this problem."""
    both = {"native": fake("native", "k = 3 is not compiled in"), "reference": reference}
    monkeypatch.setattr(ops, "available", both)
    monkeypatch.setattr(ops, "default_name", None)
    monkeypatch.setattr(ops, "_logged", set())


def resolve(requested: str | None = None) -> str:
    return ops.resolve(requested, CPU, torch.float32, 3, 64)


def test_passed_over_backend_is_logged_once(rejecting, caplog):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        assert [resolve() for _ in range(3)] == ["reference"] * 3
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pmrl_kernels", logging.INFO)
    for part in ("reference", "native", "k = 3 is not compiled in"):
        assert part in record.getMessage()


def test_each_reason_is_logged(rejecting, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        resolve()
        other = {"native": fake("native", "another reason"), "reference": reference}
        monkeypatch.setattr(ops, "available", other)
        resolve()
    assert len(caplog.records) == 2


def test_chosen_by_name_logs_nothing(rejecting, caplog):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        assert resolve("reference") == "reference"
    assert not caplog.records


def test_default_name_is_what_none_means(rejecting, monkeypatch):
    monkeypatch.setattr(ops, "default_name", "native")
    with pytest.raises(RuntimeError, match="k = 3 is not compiled in"):
        resolve()
    assert resolve("reference") == "reference"


def test_losses_use_the_resolver(rejecting, caplog):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        dominant_sv_loss(torch.eye(3), torch.eye(3))
    assert "k = 3 is not compiled in" in caplog.text
    with pytest.raises(RuntimeError, match="k = 3 is not compiled in"):
        dominant_sv_loss(torch.eye(3), torch.eye(3), backend="native")


def test_reference_declines_devices_without_float64():
    """The one device type it cannot run on; the reason has to say why."""
    assert reference.unavailable() is None
    assert reference.rejects(CPU, torch.float32, 3, 64) is None
    assert "float64" in (reference.rejects(torch.device("mps"), torch.float32, 3, 64) or "")


# ------------------------------------------------------------------------------------------------
# The environment variable
# ------------------------------------------------------------------------------------------------

CALL = "import torch, pmrl_kernels; print(pmrl_kernels.dominant_sv_loss(torch.eye(3), torch.eye(3){}).item())"


def test_environment_variable_names_the_backend():
    """In a process where the reference is not the first choice, or this could not tell."""
    code = (
        "import types\n"
        "from pmrl_kernels import ops\n"
        "import torch\n"
        "first = types.SimpleNamespace(NAME='native', rejects=lambda *_: None)\n"
        "ops.available = {'native': first, **ops.available}\n"
        "problem = (torch.device('cpu'), torch.float32, 3, 64)\n"
        "print(ops.default_name, ops.resolve(None, *problem), ops.resolve('native', *problem))\n"
    )
    assert run_python(code, PMRL_KERNELS_BACKEND="reference").stdout.split() == ["reference", "reference", "native"]
    assert run_python(code).stdout.split() == ["None", "native", "native"]


def test_unknown_name_in_the_environment():
    """An error at the first call, not at the import; an explicit argument wins."""
    done = run_python(CALL.format(""), PMRL_KERNELS_BACKEND="cuda")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    for part in ("PMRL_KERNELS_BACKEND", "'cuda'", "'reference'"):
        assert part in last
    done = run_python(CALL.format(", backend='reference'"), PMRL_KERNELS_BACKEND="cuda")
    assert (done.returncode, done.stderr) == (0, "")


def test_name_in_the_environment_that_is_not_available():
    code = (
        "from pmrl_kernels import ops\n"
        "ops.available.pop('native', None)\n"
        "ops.unavailable_reasons['native'] = 'no compiler was found'\n"
    )
    done = run_python(code + CALL.format(""), PMRL_KERNELS_BACKEND="native")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "RuntimeError: backend 'native' is not available: no compiler was found"


def test_empty_environment_variable_is_none():
    """As ``PMRL_KERNELS_BACKEND= python train.py`` leaves it."""
    code = "from pmrl_kernels import ops; print(ops.default_name)"
    assert run_python(code, PMRL_KERNELS_BACKEND="").stdout == "None\n"


# ------------------------------------------------------------------------------------------------
# Adding a backend
# ------------------------------------------------------------------------------------------------

OPERATORS = (
    "spectral_forward",
    "spectral_backward",
    "instance_forward",
    "instance_backward",
    "modality_forward",
    "modality_backward",
)


def importing(monkeypatch: pytest.MonkeyPatch, **modules: Callable[[], Any]) -> None:
    """New backends, faster than the others, and what happens when they are imported."""
    known = ops._import
    monkeypatch.setattr(ops, "_import", lambda name: modules[name]() if name in modules else known(name))
    monkeypatch.setattr(ops, "_PREFERENCE", (*modules, *ops._PREFERENCE))


def raising(error: BaseException) -> Callable[[], Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


@pytest.fixture
def tiny(monkeypatch) -> Iterator[Counter[str]]:
    """A new backend "tiny": one module with the reference's operators, counted, and a name in the order."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return getattr(reference.operators, name)(*arguments)

        return call

    module = fake("tiny", operators=types.SimpleNamespace(**{name: counted(name) for name in OPERATORS}))
    importing(monkeypatch, tiny=lambda: module)
    monkeypatch.setattr(ops, "default_name", None)
    loaded, _ = ops._load()
    assert next(iter(loaded)) == "tiny"
    before = dict(ops.available)
    # in place: the autograd Functions hold the same dict
    ops.available.clear()
    ops.available.update(loaded)
    yield calls
    ops.available.clear()
    ops.available.update(before)


@pytest.mark.parametrize("backend", ["tiny", None], ids=["by name", "as the fastest"])
def test_a_backend_is_one_module_and_its_name(tiny, backend):
    xs = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
    for call in (
        lambda name: dominant_sv_loss(xs, backend=name),
        lambda name: pmrl_loss(xs, backend=name),
        lambda name: pmrl_loss(xs, contrast="modality", backend=name),
        lambda name: instance_contrastive_loss(xs[0], backend=name),
    ):
        loss, expected = call(backend), call("reference")
        assert torch.equal(loss, expected)
        found = torch.autograd.grad(loss, xs, allow_unused=True)
        for a, b in zip(found, torch.autograd.grad(expected, xs, allow_unused=True), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert tiny == {
        "spectral_forward": 4,
        "spectral_backward": 4,
        "instance_forward": 2,
        "instance_backward": 2,
        "modality_forward": 1,
        "modality_backward": 1,
    }


def test_reference_has_all_operators():
    assert all(hasattr(reference.operators, name) for name in OPERATORS)


@pytest.mark.parametrize("name", ops.available)
def test_every_backend_offers_the_same(name):
    module = ops.available[name]
    assert name == module.NAME
    assert module.unavailable() is None
    assert all(callable(getattr(module.operators, operator)) for operator in OPERATORS)


def test_every_known_backend_works_or_has_a_reason():
    assert set(ops.available) | set(ops.unavailable_reasons) == set(ops._PREFERENCE)
    assert not set(ops.available) & set(ops.unavailable_reasons)
    assert all(ops.unavailable_reasons.values())
    order = [name for name in ops._PREFERENCE if name in ops.available]
    assert list(ops.available) == order


def test_loading_says_why_a_backend_does_not_work(monkeypatch, caplog):
    """Whatever happened, the others work; what is merely not there is no warning."""
    refusing = types.SimpleNamespace(NAME="refusing", unavailable=lambda: "the driver is too old")
    damaged = types.SimpleNamespace(NAME="damaged", unavailable=lambda: "half of it is missing", broken=True)
    importing(
        monkeypatch,
        absent=raising(ImportError("cannot import name 'absent' from 'pmrl_kernels.ops'")),
        needy=raising(ModuleNotFoundError("No module named 'nobody_has_it'", name="nobody_has_it")),
        refusing=lambda: refusing,
        damaged=lambda: damaged,
        incomplete=raising(ModuleNotFoundError("No module named 'pmrl_kernels.x'", name="pmrl_kernels.x")),
        unnamed=raising(ModuleNotFoundError("nothing of the kind")),
        failing=raising(RuntimeError("CUDA error: no kernel image")),
        wrong=raising(SyntaxError("invalid syntax")),
        empty=lambda: types.SimpleNamespace(NAME="empty"),
        late=lambda: types.SimpleNamespace(NAME="late", unavailable=raising(OSError("no such driver"))),
    )
    here = importlib.util.find_spec("pmrl_kernels.ops.constants")
    found = {"pmrl_kernels.ops.absent": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name, here))
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        loaded, reasons = ops._load()
    assert list(loaded) == list(ops.available)
    wanted = {
        "absent": ("this version of pmrl_kernels does not contain it", logging.INFO),
        "needy": ("it needs the module 'nobody_has_it', which is not installed", logging.INFO),
        "refusing": ("the driver is too old", logging.INFO),
        "damaged": ("half of it is missing", logging.WARNING),
        "incomplete": ("ModuleNotFoundError: No module named 'pmrl_kernels.x'", logging.WARNING),
        "unnamed": ("ModuleNotFoundError: nothing of the kind", logging.WARNING),
        "failing": ("RuntimeError: CUDA error: no kernel image", logging.WARNING),
        "wrong": ("SyntaxError: invalid syntax", logging.WARNING),
        "empty": ("AttributeError: 'types.SimpleNamespace' object has no attribute 'unavailable'", logging.WARNING),
        "late": ("OSError: no such driver", logging.WARNING),
    }
    assert {name: reasons[name] for name in wanted} == {name: reason for name, (reason, _) in wanted.items()}
    told = {record.getMessage(): (record.name, record.levelno) for record in caplog.records}
    for name, (reason, level) in wanted.items():
        assert told[f"the {name} backend is not available: {reason}"] == ("pmrl_kernels", level)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_who_ends_the_import_ends_it(monkeypatch, error):
    importing(monkeypatch, stopped=raising(error))
    with pytest.raises(type(error)):
        ops._load()


def test_without_the_reference_there_is_no_package(monkeypatch):
    """It has no reason not to work; an error in it is not for hiding."""
    monkeypatch.setattr(ops, "_import", raising(RuntimeError("no such operator")))
    with pytest.raises(RuntimeError, match=r"^no such operator$"):
        ops._load()


def copy_of_the_package(folder: Path, name: str = "pmrl_kernels") -> Path:
    """Without the library, which is not what is tested there."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "native_build.txt")
    return Path(shutil.copytree(PACKAGE, folder / name, ignore=ignored))


SABOTAGED = """
import importlib, io, json, logging, pathlib, sys
import torch
log = io.StringIO()
logging.basicConfig(stream=log, level=logging.WARNING, format="%(message)s")
for file in ("native.py", "triton/__init__.py"):
    path = pathlib.Path("pmrl_kernels", "ops", file)
    whole = path.read_text()
    for code in ("import nobody_has_it", "1 / 0", "def", "raise SystemError"):
        for module in [m for m in sys.modules if m.partition(".")[0] == "pmrl_kernels"]:
            del sys.modules[module]
        log.truncate(log.seek(0))
        path.write_text(code)
        importlib.invalidate_caches()
        from pmrl_kernels import ops, dominant_sv_loss, info
        dominant_sv_loss(torch.eye(3), torch.eye(3))
        reason = ops.unavailable_reasons[file.partition("/")[0].removesuffix(".py")]
        print(json.dumps([code, reason, log.getvalue(), f"not available: {reason}" in info.report()]))
    path.write_text(whole)
"""


def test_importing_survives_a_backend_that_cannot_be_imported(tmp_path):
    """The reference works, info tells the reason, and so does the log where something is broken."""
    copy_of_the_package(tmp_path)
    done = run_python(SABOTAGED, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")
    wanted = {
        "import nobody_has_it": r"it needs the module 'nobody_has_it', which is not installed",
        "1 / 0": r"ZeroDivisionError: division by zero",
        "def": r"SyntaxError: .*",
        "raise SystemError": "SystemError: ",
    }
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, *_ in told] == [*wanted, *wanted]
    for number, (code, reason, log, reported) in enumerate(told):
        name = "native" if number < len(wanted) else "triton"
        assert re.fullmatch(wanted[code], reason)
        assert log == ("" if "needs" in reason else f"the {name} backend is not available: {reason}\n")
        assert reported


# ------------------------------------------------------------------------------------------------
# What those see who read sources
# ------------------------------------------------------------------------------------------------


def test_every_backend_is_imported_by_a_statement():
    assert {f"ops.{name}" for name in ops._PREFERENCE} <= imports_of("ops")
    assert [ops._import(name).NAME for name in ops._PREFERENCE] == list(ops._PREFERENCE)


def test_static_analysis_finds_the_whole_package():
    """What freezes a program into a file takes along what it can see being imported, by bytecode."""
    finder = modulefinder.ModuleFinder(path=[str(PACKAGE.parent)])
    finder.import_hook("pmrl_kernels")
    found = {name for name in finder.modules if name.partition(".")[0] == "pmrl_kernels"}
    assert found == {f"pmrl_kernels.{name}".rstrip(".") for name in MODULES} - {"pmrl_kernels.info"}


def test_no_backend_at_all():
    """The reasons for that stand in the error."""
    with pytest.raises(RuntimeError, match=r"no backend can run .* on cpu: triton: triton is not installed$"):
        choose([])


# ------------------------------------------------------------------------------------------------
# A second import in one process
# ------------------------------------------------------------------------------------------------

TWICE = """
import importlib, os, sys
import torch

def call(package, compiled=False, left_out=()):
    found = {}
    for name in importlib.import_module(package.__name__ + ".ops").available:
        if name in left_out:
            continue
        generator = torch.Generator().manual_seed(0)
        xs = [torch.randn(4, 6, generator=generator, requires_grad=True) for _ in range(3)]
        loss = package.pmrl_loss
        if compiled:
            loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
        value = loss(xs, contrast="modality", backend=name)
        value.backward()
        found[name] = [value.item(), *(x.grad.sum().item() for x in xs)]
    return found

def purge():
    for module in [m for m in sys.modules if m.partition(".")[0] == "pmrl_kernels"]:
        del sys.modules[module]
    importlib.invalidate_caches()
"""


def twice(code: str, folder: Path | None = None, **environment: str) -> str:
    done = run_python(TWICE + code, cwd=folder, PYTHONDONTWRITEBYTECODE="1", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def with_triton_if_there_is_one() -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if importlib.util.find_spec("triton") else {}


AGAIN = """
import pmrl_kernels as first
expected = call(first)
for _ in range(2):
    purge()
    import pmrl_kernels as second
    assert second is not first
    assert call(second) == expected
    assert call(first) == expected
print(*expected)
"""


def test_importing_the_package_anew():
    """As notebooks and test runners do. Whoever kept a function of the old modules can go on using it."""
    wanted = [*ops.available]
    environment = with_triton_if_there_is_one()
    if environment and "triton" not in wanted:
        wanted.insert(wanted.index("reference"), "triton")
    assert twice(AGAIN, **environment).split() == wanted


CHANGED = """
import pathlib
import pmrl_kernels as first
before = call(first)["reference"][0]
path = pathlib.Path("pmrl_kernels", "ops", "reference.py")
text = path.read_text()
head, mark, tail = text.partition("_TEMPERATURE = ")
change = "unchanged = modality_forward\\ndef modality_forward(*a):\\n    x, *y = unchanged(*a)\\n"
change += "    return (x + 1, *y)\\n"
path.write_text(head + change + mark + tail)
purge()
import pmrl_kernels as second
print(call(second)["reference"][0] - before, call(first)["reference"][0] - before)
"""


def test_importing_the_package_anew_runs_what_is_written_there_now(tmp_path):
    """And not the operators of the first import, which keep serving that."""
    copy_of_the_package(tmp_path)
    new, old = map(float, twice(CHANGED, tmp_path).split())
    assert new == pytest.approx(1)
    assert old == 0


def test_a_vendored_copy_beside_the_package(tmp_path):
    """Under another name, as another project carries it along: each computes by itself, compiled too."""
    copy_of_the_package(tmp_path)
    copy_of_the_package(tmp_path, "someones_pmrl")
    code = "import someones_pmrl as a, pmrl_kernels as b\nexpected = call(a)\nassert call(b) == expected\n"
    twice(code + "print(call(b, True) == call(a, True) == expected)", tmp_path)


# Forked, since torch takes a second to import. What is interrupted: files about to be read, and each step of
# registering operators, before and after it.
INTERRUPTED = """
torch.set_num_threads(1)

def attempt(stop):
    counted = 0

    def count():
        nonlocal counted
        counted += 1
        if counted == stop:
            raise KeyboardInterrupt

    def interrupting(real):
        def run(*arguments, **named):
            count()
            result = real(*arguments, **named)
            count()
            return result
        return run

    Library = torch.library.Library
    for owner, name in [(torch.library, "register_fake"), (torch.ops, "load_library"),
                        (Library, "__init__"), (Library, "define"), (Library, "impl")]:
        setattr(owner, name, interrupting(getattr(owner, name)))

    class Finder:
        def find_spec(self, name, *rest):
            if name.startswith("pmrl_kernels."):
                count()

    sys.meta_path.insert(0, Finder())
    try:
        import pmrl_kernels
    except KeyboardInterrupt:
        assert counted == stop
        import pmrl_kernels
    else:
        assert not stop
    call(pmrl_kernels, left_out=("triton",))  # in its interpreter a call takes as long as all the rest
    from pmrl_kernels import ops
    os.write(pipe, f"{counted} {len(ops.available)}".encode())

pipe = 1
total, stop = None, 0
while stop == 0 or stop <= total:
    reading, pipe = os.pipe()
    if not (child := os.fork()):
        try:
            attempt(stop)
        except BaseException as error:
            os.write(pipe, repr(error).encode())
        os._exit(0)
    os.close(pipe)
    os.waitpid(child, 0)
    told = os.read(reading, 10000).decode().strip()
    os.close(reading)
    if stop == 0:
        total = int(told.split()[0])
    print(f"{stop}: {told}")
    stop += 1 if stop < 10 else 5
"""


def test_a_retry_after_an_interrupted_import():
    told = twice(INTERRUPTED, **with_triton_if_there_is_one()).splitlines()
    total, number = map(int, told[0].removeprefix("0: ").split())
    assert total > 40
    assert len(told) > total / 5
    for line in told[1:]:
        assert re.fullmatch(rf"\d+: \d+ {number}", line), line


# ------------------------------------------------------------------------------------------------
# Which Triton
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def with_triton(monkeypatch, tmp_path) -> Callable[..., tuple[str | None, str]]:
    """Why there is no Triton backend, and what info tells, where these distributions are installed."""
    real = importlib.metadata.version

    def call(**versions: str | None) -> tuple[str | None, str]:
        for name, number in versions.items():
            (tmp_path / f"{name}-1.dist-info").mkdir()
            text = f"Name: {name}\n" + ("" if number is None else f"Version: {number}\n")
            (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(text)

        def version(name: str) -> str:
            if name.replace("-", "_") not in versions:  # what is really installed here
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setattr(triton, "_INTERPRETED", True)
        monkeypatch.setattr(triton, "version", triton.version.__wrapped__)  # not what was found before
        (line,) = (line for line in info.report().splitlines() if line.startswith("triton  "))
        return triton.unavailable(), line.split(None, 1)[1]

    return call


@pytest.mark.parametrize("distribution", ["triton", "pytorch_triton", "pytorch_triton_rocm", "triton_rocm"])
@pytest.mark.parametrize("version", ["3.5.1", "3.5.1+git0d1e2f3", "2.9.0rc1", "3.5"])
def test_an_old_triton_is_a_reason(with_triton, distribution, version):
    told = with_triton(**{distribution: version})
    assert told == (f"it needs Triton 3.6 or newer, found {version}", version)


@pytest.mark.parametrize("distribution", ["triton", "pytorch_triton", "pytorch_triton_rocm"])
@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git5a3b", "3.6rc1", "3.10.0.dev20260101", "4.0"])
def test_a_triton_that_is_new_enough(with_triton, distribution, version):
    assert with_triton(**{distribution: version}) == (None, version)


@pytest.mark.parametrize("version", ["unknown", "main-5a3b", None])
def test_a_triton_of_unknown_version_is_tried(with_triton, version):
    assert with_triton(triton=version) == (None, version or "of unknown version")


def test_of_two_distributions_the_newer_one_counts(with_triton):
    """Both have written to one folder: the later one won, which metadata do not tell."""
    assert with_triton(triton="2.1.0", pytorch_triton_rocm="3.6.0") == (None, "3.6.0")


def test_something_else_called_triton(monkeypatch):
    """A stand-in of another program's, which has no specification."""
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert triton.installed()
    assert info.report()


# ------------------------------------------------------------------------------------------------
# info, and what an import costs
# ------------------------------------------------------------------------------------------------


def test_info():
    done = subprocess.run(
        [sys.executable, "-W", "default", "-m", "pmrl_kernels.info"],
        env={key: value for key, value in os.environ.items() if key != "PMRL_KERNELS_BACKEND"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    facts = {label: value.strip() for label, value in facts.items()}
    assert facts["pmrl_kernels"] == pmrl_kernels.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert facts["python"].startswith(sys.version.split()[0])
    assert {"triton", "cpu"} <= set(facts)
    for name in ops._PREFERENCE:
        reason = ops.unavailable_reasons.get(name)
        assert facts[f"backend {name}"] == ("works" if reason is None else f"not available: {reason}")
    assert facts["default"] == "the fastest that works"


def test_info_shows_the_environment_variable(monkeypatch):
    monkeypatch.setattr(ops, "default_name", "reference")
    assert info.report().splitlines()[-1].split(None, 1) == ["default", "reference (PMRL_KERNELS_BACKEND)"]


def line_of_info(label: str, **environment: str) -> str:
    """What ``python -m pmrl_kernels.info`` says there, in a process with these variables."""
    done = run_python("from pmrl_kernels import info; print(info.report())", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{label}  "))
    return line.removeprefix(label).strip()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("pass", "in float32"),
        ("torch.set_float32_matmul_precision('highest')", "in float32"),
        ("torch.set_float32_matmul_precision('high')", "may be in tf32 on CPUs, tf32 on GPUs, where contrasts are"),
        ("torch.set_float32_matmul_precision('medium')", "may be in bf16 on CPUs, tf32 on GPUs, where contrasts are"),
        ("torch.backends.fp32_precision = 'tf32'", "may be in tf32 on CPUs, tf32 on GPUs, where contrasts are"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "may be in bf16 on CPUs, where contrasts are"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "may be in tf32 on GPUs, where contrasts are"),
        ("torch.backends.fp32_precision = 'ieee'", "in float32"),
    ],
)
def test_info_shows_how_float32_matrices_are_multiplied(setting, told):
    """A setting of the process, so of one that makes it and asks."""
    done = run_python(f"import torch; {setting}; from pmrl_kernels import info; print(info.report())")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("float32 products  "))
    line = line.removeprefix("float32 products").strip()
    assert line.startswith(told)
    assert line == "in float32" or line.endswith("less exact (docs/contract.md)")


def test_info_remarks_on_an_unknown_name_in_the_environment():
    """Every call without ``backend=`` then raises."""
    told = line_of_info("default", PMRL_KERNELS_BACKEND="nonsense")
    assert told.startswith("nonsense (PMRL_KERNELS_BACKEND), unknown: wanted one of ")
    assert all(repr(name) in told for name in ops._PREFERENCE)


def test_info_remarks_on_a_name_in_the_environment_that_is_not_available(monkeypatch):
    monkeypatch.setattr(ops, "default_name", "native")
    monkeypatch.setattr(ops, "available", {"reference": reference})
    monkeypatch.setattr(ops, "unavailable_reasons", {"native": "no compiler was found"})
    line = info.report().splitlines()[-1]
    assert line.split(None, 1) == ["default", "native (PMRL_KERNELS_BACKEND), not available: no compiler was found"]


@pytest.mark.parametrize(
    ("sums", "told"),
    [
        ("float64", "float64 (PMRL_KERNELS_SUMS)"),
        ("float32", "float32 (PMRL_KERNELS_SUMS)"),
        ("bf16", "bf16 (PMRL_KERNELS_SUMS), unknown: wanted one of 'float64', 'float32'"),
    ],
)
def test_info_shows_how_gpus_are_to_sum(sums, told):
    assert line_of_info("sums on GPUs", PMRL_KERNELS_SUMS=sums) == told


INTO = """
import io, runpy, sys
import torch
import pmrl_kernels

class Silent:
    def write(self, text):
        self.text = text
    def flush(self):
        pass

for stream in (None, io.StringIO(), Silent(), io.TextIOWrapper(io.BytesIO(), "ascii")):
    sys.stdout = stream
    runpy.run_module("pmrl_kernels.info", run_name="__main__")
assert b"default" in stream.buffer.getvalue()
"""


def test_info_into_whatever_stands_for_the_screen():
    """None, as in a program without a console; streams that have no encoding; a terminal of ASCII."""
    done = run_python(INTO)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_info_to_someone_who_stops_reading():
    """As ``| head -1`` does; here before there is anything to read."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pmrl_kernels.info"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_of_backends_that_cannot_be_asked(monkeypatch):
    """Describing what is broken is what it is for."""
    monkeypatch.setattr(native, "describe", raising(OSError("no such disk")))
    monkeypatch.setattr(triton, "version", raising(ValueError("no such version")))
    report = info.report()
    assert re.search("(?m)^native library +cannot be told: no such disk$", report)
    assert re.search("(?m)^triton +(cannot be told: no such version|not installed)$", report)


def test_importing_is_quiet_and_light():
    """Beyond torch itself: no output, and none of the heavy packages of the examples or of one backend."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import pmrl_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'triton', 'sklearn', 'matplotlib', 'tqdm', 'numpy', 'scipy', 'hypothesis'}\n"
        "assert 'pmrl_kernels' in new\n"
        "sys.exit(f'imported {sorted(new & heavy)}' if new & heavy else 0)\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_changes_no_global_state():
    """Of torch or of logging: a library leaves those to its user."""
    code = (
        "import logging, torch\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_rng_state().tolist(), torch.get_num_threads(),\n"
        "            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),\n"
        "            torch.get_float32_matmul_precision(), logging.root.level, list(logging.root.handlers))\n"
        "before = state()\n"
        "import pmrl_kernels\n"
        "assert state() == before\n"
        "assert not logging.getLogger('pmrl_kernels').handlers\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------

# Every file may import from the rows below its own, never from its own row or above. "" is the package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("info",),
    ("",),
    ("modules", "compilation", "diagnostics"),
    ("losses", "spectral"),
    ("inputs",),
    ("autograd",),
    ("ops", "distributed"),
    ("ops.native", "ops.triton"),
    ("ops.reference", "ops.binary", "ops.triton.launch"),
    ("ops.triton.kernels",),
    ("ops.triton.streams",),
    ("ops.triton.kspace",),
    ("ops.triton.eigen",),
    ("ops.constants",),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


def module_name(path: Path) -> str:
    """losses.py -> "losses", ops/__init__.py -> "ops", __init__.py -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_within_the_package(name: str, source: str, is_package: bool) -> set[str]:
    """Modules of the package that ``source`` imports, at the top or inside functions."""
    here = ["pmrl_kernels", *filter(None, name.split("."))]
    package = here if is_package else here[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *filter(None, (node.module or "").split("."))]
            # ``from package import x``: x may be a module, or a name in the package
            full = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for target in full:
            if target.split(".")[0] != "pmrl_kernels":
                continue
            inner = target.removeprefix("pmrl_kernels").removeprefix(".")
            while inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return imports_within_the_package(name, path.read_text(), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("name", "source", "is_package", "expected"),
    [
        ("losses", "from . import autograd, inputs", False, {"autograd", "inputs"}),
        ("losses", "from .ops import resolve", False, {"ops"}),
        ("losses", "def f():\n    import pmrl_kernels.ops.constants", False, {"ops.constants"}),
        ("info", "from . import __version__, ops", False, {"", "ops"}),
        (
            "ops.reference",
            "from .. import losses\nfrom . import constants",
            False,
            {"losses", "ops.constants"},
        ),
        ("ops", "from . import constants\nimport torch, os.path", True, {"ops.constants"}),
        ("", "from .losses import pmrl_loss", True, {"losses"}),
    ],
)
def test_imports_are_found(name, source, is_package, expected):
    """The test below is only as good as this."""
    assert imports_within_the_package(name, source, is_package) == expected


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    """Strictly downwards, so there can be no cycle either."""
    assert name in LEVEL, f"{name} is new: give it its place in LAYERS"
    for target in imports_of(name):
        assert LEVEL[target] > LEVEL[name], f"{name or 'the package'} must not import {target or 'the package'}"


def test_reference_stands_alone():
    """It is the oracle of the kernels, so it may share nothing with them but the constants."""
    assert imports_of("ops.reference") == {"ops.constants"}
    assert imports_of("ops.constants") == set()


def test_users_files_reach_backends_through_the_resolver_only():
    for name in ("", "modules", "losses", "spectral"):
        assert not {target for target in imports_of(name) if target.startswith("ops.")} - {"ops.constants"}


# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

each_precision = pytest.mark.parametrize("double_input", [False, True], ids=["32 bits", "float64"])
each_k = pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16, 32])


def left_of_the_next(k: int, double_input: bool, squarings: int) -> float:
    """log of (λ_j/λ₁)^(2^s) at the smallest gap that counts."""
    return 2.0**squarings * math.log1p(-constants.eigenvalue_gap(k, double_input))


@each_precision
@each_k
def test_squarings_tell_ties_from_gaps(k, double_input):
    """At the smallest gap that counts the second eigenvector still shows in P, at three times that no more."""
    steps = constants.squarings(k, double_input)
    assert -20 <= left_of_the_next(k, double_input, steps) <= -10
    assert 2 * math.exp(left_of_the_next(k, double_input, steps)) > constants.RANK_ONE
    assert 2 * math.exp(3 * left_of_the_next(k, double_input, steps)) < constants.RANK_ONE
    assert constants.RANK_ONE > 1000 * constants.EPS64


@pytest.mark.parametrize("k", [2, 3, 8, 32])
def test_squarings_down_to_rank_1_tell_the_gap(k):
    """Within a factor of 2.3, whether one eigenvalue is that near to the first or all the others are."""
    for near in (1, k - 1):
        for gap in (10.0**-e for e in range(1, 15)):
            n, excess = 0, 1.0
            while excess > constants.RANK_ONE:
                share = near * math.exp(2.0**n * math.log1p(-gap))
                excess = (2 * share + (1 - 1 / near) * share * share) / (1 + share) ** 2  # 1 - ‖P‖², P of trace 1
                n += excess > constants.RANK_ONE
            assert 28 <= -math.log1p(-gap) * 2.0**n <= 64
            noise, least = constants.zero_sum(k) / gap, constants.zero_sum(k) * max(1, 2.0**n / 64)
            assert least <= noise <= 3.3 * least


def test_squarings_of_the_docstring():
    assert constants.squarings(4, False) == 25
    assert constants.squarings(4, True) == 50


def test_epsilons_are_torch_s():
    assert torch.finfo(torch.float32).eps == constants.EPS32
    assert torch.finfo(torch.float64).eps == constants.EPS64


@each_precision
@each_k
def test_thresholds_are_those_of_the_contract(k, double_input):
    eps32, eps64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    assert constants.singular_value_floor(k, double_input) == (math.sqrt(k * eps64) if double_input else eps32)
    assert constants.eigenvalue_gap(k, double_input) == (16 * k * eps64 if double_input else 4 * eps32)
    assert constants.zero_sum(k) == 16 * k * eps64
    assert constants.MAX_MODALITIES == 32
