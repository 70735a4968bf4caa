"""Importing the package and its backends: what each offers, one that fails, and importing it all anew."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pmrl_kernels import dominant_sv_loss, instance_contrastive_loss, ops, pmrl_loss
from pmrl_kernels.ops import reference
from pmrl_kernels.ops.operators import Pair
from tests.tools.backends import ALL_OPS, PACKAGE, choose, fake_module, operators, raising, run_python, use_backends

# ------------------------------------------------------------------------------------------------
# What a backend is, and what becomes of one that fails
# ------------------------------------------------------------------------------------------------


OPERATORS = (
    "spectral_forward",
    "spectral_backward",
    "paired_forward",
    "paired_backward",
)


def importing(monkeypatch: pytest.MonkeyPatch, **modules: Callable[[], Any]) -> None:
    """New backends, faster than the others, and what happens when they are imported."""
    known = ops._import
    monkeypatch.setattr(ops, "_import", lambda name: modules[name]() if name in modules else known(name))
    monkeypatch.setattr(ops, "_PREFERENCE", (*modules, *ops._PREFERENCE))


@pytest.fixture
def tiny(monkeypatch) -> Counter[str]:
    """A new backend "tiny": one module, pairs of the reference's operators, counted, and a name in the order."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return getattr(operators("reference"), name)(*arguments)

        return call

    def implementing(family: Any) -> types.SimpleNamespace:
        def implementations(backend: str) -> Any:
            if backend != "tiny":
                return family.implementations(backend)
            functions = {op.name: [counted(name) for name in op.signatures()] for op in family.OPS}
            return {name: Pair("tiny", *pair, reference.rejects) for name, pair in functions.items()}

        return types.SimpleNamespace(OPS=family.OPS, implementations=implementations)

    importing(monkeypatch, tiny=lambda: fake_module("tiny"))
    monkeypatch.setattr(ops, "FAMILIES", tuple(map(implementing, ops.FAMILIES)))
    loaded, _ = ops._load()
    assert next(iter(loaded)) == "tiny"
    use_backends(monkeypatch, loaded)
    return calls


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
        "paired_forward": 3,
        "paired_backward": 3,
    }


def test_reference_has_all_operators():
    assert ops.available["reference"].lacking == {}
    assert all(hasattr(operators("reference"), name) for name in OPERATORS)


@pytest.mark.parametrize("name", ops.available)
def test_every_backend_offers_an_op_or_says_why_not(name):
    backend, module = ops.available[name], ops._import(name)
    assert name == backend.name == module.NAME
    assert module.unavailable() is None
    assert set(backend.pairs) | set(backend.lacking) == set(ALL_OPS)
    assert not set(backend.pairs) & set(backend.lacking)
    assert all(backend.lacking.values())
    assert "spectral" in backend.pairs
    for pair in backend.pairs.values():
        assert pair.backend == name
        assert all(map(callable, pair[1:]))


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


CRIPPLED = """
import importlib, io, json, logging, pathlib, sys
import torch
log = io.StringIO()
logging.basicConfig(stream=log, level=logging.INFO, format="%(levelname)s %(message)s")
for code in codes:
    for module in [m for m in sys.modules if m.partition(".")[0] == "pmrl_kernels"]:
        del sys.modules[module]
    log.truncate(log.seek(0))
    pathlib.Path("pmrl_kernels", "ops", family, "native.py").write_text(code)
    importlib.invalidate_caches()
    from pmrl_kernels import ops, dominant_sv_loss, info, instance_contrastive_loss, joint_scores
    dominant_sv_loss(torch.eye(3), torch.eye(3)), instance_contrastive_loss(torch.eye(3))
    joint_scores(torch.eye(3), torch.eye(3))
    line = next(line for line in info.report().splitlines() if line.startswith("backend native"))
    print(json.dumps([line.split(None, 2)[2], log.getvalue()]))
"""
WHOLE = (
    "from .reference import PAIRS as found\nPAIRS = {n: pair._replace(backend='native') for n, pair in found.items()}\n"
)


@pytest.mark.parametrize("family", ["spectral", "contrast", "joint"])
def test_importing_survives_pairs_that_cannot_be_imported(tmp_path, family):
    """Of a backend that has others: both are told, and the reference computes what is lacking."""
    folder = copy_of_the_package(tmp_path) / "ops"
    (folder / "native.py").write_text(
        "NAME, describe = 'native', str\n\ndef unavailable(): pass\n\ndef rejects(*problem): pass\n"
    )
    for other in {"spectral", "contrast", "joint"} - {family}:
        (folder / other / "native.py").write_text(WHOLE)
    wanted = {
        "import nobody_has_it": ("it needs the module 'nobody_has_it', which is not installed", "INFO"),
        "1 / 0": ("ZeroDivisionError: division by zero", "WARNING"),
        "from ..reference import nobody": ("ImportError: cannot import name 'nobody'", "WARNING"),
    }
    script = f"family, codes = {family!r}, {list(wanted)!r}\n{CRIPPLED}"
    done = run_python(script, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")
    names = ", ".join(op.name for f in ops.FAMILIES for op in f.OPS if f.__name__.endswith(family))
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for (line, log), (reason, level) in zip(told, wanted.values(), strict=True):
        assert line.startswith(f"works; no kernels for {names}, which the next one computes ({reason}")
        assert f"{level} the native backend has no kernels for {names}: {reason}" in log
        first = names.partition(",")[0]
        assert f"using the reference backend; passed over native: no kernels for {first}, {reason}" in log


def test_a_backend_without_any_kernels_is_not_available(monkeypatch):
    importing(monkeypatch, idle=lambda: fake_module("idle"))
    loaded, reasons = ops._load()
    assert "idle" not in loaded
    assert reasons["idle"] == "it has no kernels: there are none"


def test_no_backend_at_all():
    """The reasons for that stand in the error."""
    with pytest.raises(RuntimeError, match=r"no backend can run .* on cpu: triton: triton is not installed$"):
        choose([])


# ------------------------------------------------------------------------------------------------
# Adding an op family
# ------------------------------------------------------------------------------------------------

ADDED = """
import torch
from pmrl_kernels import info, ops
from pmrl_kernels.ops import dots, function
from pmrl_kernels.ops.dots.spec import DOTS, Dots

def scores(query, candidates, backend=None):
    pair = ops.resolve(DOTS, backend, query.device, query.dtype, 1, query.shape[1])
    return function.apply(Dots(pair), (query, candidates))[0]

query, candidates = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
found, expected = scores(query, candidates), query @ candidates.T
assert torch.equal(found, expected)
weights = torch.randn(3, 4)
for a, b in zip(*(torch.autograd.grad(x, (query, candidates), weights) for x in (found, expected))):
    assert torch.allclose(a, b)
compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(query, candidates), expected)
assert torch.equal(torch.func.grad(lambda x: scores(x, candidates).sum())(query), candidates.sum(0).expand(3, 5))
for operator in ops.available["reference"].pairs["dots"][1:3]:
    arguments = [query.detach(), candidates.detach()]
    backward = "backward" in operator._schema.name
    extra = [torch.empty(0), weights] if backward else []
    torch.library.opcheck(operator, (*arguments, *extra))
print(info.report())
"""


def test_the_worked_example_of_an_op_family(tmp_path):
    """docs/layering.md, as it stands there: a folder, and one name elsewhere."""
    package = copy_of_the_package(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "layering.md").read_text()
    blocks = re.findall(r"```python\n# (ops/dots/\S+)\n(.*?)```", text, re.DOTALL)
    assert [name.rpartition("/")[2] for name, _ in blocks] == ["spec.py", "reference.py", "__init__.py"]
    (package / "ops" / "dots").mkdir()
    for name, code in blocks:
        (package / name).write_text(code)
    registry = package / "ops" / "__init__.py"
    before = registry.read_text()
    after = before.replace("(spectral, contrast, joint)", "(spectral, contrast, joint, dots)")
    after = after.replace("import contrast, joint, spectral", "import contrast, dots, joint, spectral")
    assert len(after) - len(before) == 2 * len(", dots")
    registry.write_text(after)
    done = run_python(ADDED, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("(?m)^backend reference +works$", done.stdout)


# ------------------------------------------------------------------------------------------------
# A second import in one process
# ------------------------------------------------------------------------------------------------


TWICE = """
import importlib, os, sys
import torch

def call(package, compiled=False, left_out=()):
    found = {}
    for name, backend in importlib.import_module(package.__name__ + ".ops").available.items():
        if name in left_out or backend.rejects(torch.device("cpu"), torch.float32, 3, 6):
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
    cpu = torch.device("cpu")
    wanted = [name for name, backend in ops.available.items() if not backend.rejects(cpu, torch.float32, 3, 6)]
    environment = with_triton_if_there_is_one()
    if environment and "triton" not in wanted:
        wanted.insert(wanted.index("reference"), "triton")
    assert twice(AGAIN, **environment).split() == wanted


CHANGED = """
import pathlib
import pmrl_kernels as first
before = call(first)["reference"][0]
path = pathlib.Path("pmrl_kernels", "ops", "contrast", "reference.py")
text = path.read_text()
head, mark, tail = text.partition("def _forward_shapes")
change = "unchanged = paired_forward\\ndef paired_forward(*a):\\n    x, *y = unchanged(*a)\\n"
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
    os.write(pipe, f"{counted} {sum(len(backend.pairs) for backend in ops.available.values())}".encode())

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


@pytest.mark.slow
def test_a_retry_after_an_interrupted_import():
    told = twice(INTERRUPTED, **with_triton_if_there_is_one()).splitlines()
    total, number = map(int, told[0].removeprefix("0: ").split())
    assert total > 40
    assert len(told) > total / 5
    for line in told[1:]:
        assert re.fullmatch(rf"\d+: \d+ {number}", line), line


# ------------------------------------------------------------------------------------------------
# What an import costs
# ------------------------------------------------------------------------------------------------


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
