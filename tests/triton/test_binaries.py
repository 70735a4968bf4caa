"""Kernels compiled ahead of time, without a GPU: what they take, and what their instructions are."""

from __future__ import annotations

import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no packages for this system")

from pmrl_kernels.ops.contrast.triton import kernels
from pmrl_kernels.ops.triton import runtime
from tests import ROOT, TOOLS
from tests.tools import ahead, resources
from tests.tools.processes import run

if runtime.INTERPRETED:
    pytest.skip("this process interprets; these tests start such processes themselves", allow_module_level=True)


def compiled(*arguments: str) -> str:
    done = run(str(TOOLS / "resources.py"), *arguments, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert not done.stderr  # some errors of AMD's compiler show there alone
    return done.stdout


def compiled_for(target: str, one: runtime.Launch) -> Any:
    return runtime.compile_for(resources.TARGETS[target], one.kernel, one.compilation())


def rows_of(text: str) -> dict[tuple[str, ...], list[list[int]]]:
    """(target, call, dtype, k, kernel, warps) -> registers, stack, shared memory of each kernel that is called so."""
    rows: dict[tuple[str, ...], list[list[int]]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            row = line.split()
            rows.setdefault(tuple(row[:6]), []).append(list(map(int, row[6:9])))
    return rows


def test_kernels_compile_without_spills():
    rows = rows_of(compiled("--quick"))
    assert {key[0] for key in rows} == {case.target for case in resources.QUICK}
    assert {key[4] for key in rows} >= {"forward_kernel", "gram_kernel", "solve_kernel", "backward_kernel"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_on_tensor_cores_compile(dtype):
    """Triton 3.6 has a layout for their operands only if it sees no narrow load behind them."""
    for one in resources.launches(resources.Case("sm_90", "alignment", dtype, 12, masked=True)):
        binary = compiled_for("sm_90", one)
        if one.kernel.fn.__name__ != "reduce_kernel":
            assert re.search(r"\bmma\.sync\S*f64", binary.asm["ptx"])


def test_two_modalities_compile():
    """Triton 3.6 could not lay out the columns of 2 x 2 matrices."""
    for one in resources.launches(resources.Case("sm_90", "triplet", "fp32", 2)):
        assert compiled_for("sm_90", one).asm["cubin"]


def test_gradients_of_contrasts_compile_for_tensor_memory():
    """Triton 3.6 could not lay out the sum over the one axis that is left of a tile's sums of rows."""
    launches = resources.launches(resources.Case("sm_100", "modality", "fp32", 3))
    found = [one for one in launches if one.kernel.fn.__name__ == "weights_kernel" and one.warps < 8]
    texts = (compiled_for("sm_100", one).asm["ptx"] for one in found)  # the first will do
    assert any("tcgen05.ld" in text for text in texts), "none whose products are in tensor memory"


@pytest.mark.slow
def test_resources_are_those_of_the_table(sampled):
    """A kernel that takes more than it did is seen where it is reviewed: `make resources` rewrites the table."""
    written = resources.TABLE.read_text()
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert written.startswith(f"# triton {pinned}. "), "another version of Triton: rewrite the table"
    text = compiled(*sampled(1, "--every"))
    rows, table = rows_of(text), rows_of(written)
    cases = {key[:4] for key in rows}
    table = {key: row for key, row in table.items() if key[:4] in cases}
    assert len(cases) >= 5
    if text.splitlines()[0] == written.splitlines()[0]:
        assert rows == table
    else:  # each version hands out registers in its own way: these are kernels that may not spill, and no other ones
        assert {key: len(row) for key, row in rows.items()} == {key: len(row) for key, row in table.items()}


def widths(value: Any, integers: int) -> list[int]:
    """Of what is passed for an argument, in bits; integers in a tuple are distances between addresses."""
    if isinstance(value, tuple):
        return [width for part in value for width in widths(part, 64)]
    return [] if value is None else [integers if isinstance(value, int) else 64]


def test_binaries_take_what_launches_pass():
    """Arguments go to the compiled function as they are: what has a value, in order, tuples flattened."""
    for one in resources.launches(resources.Case("sm_90", "pmrl", "fp32", 3, masked=True)):
        passed = [width for value in one.arguments for width in widths(value, 32)]
        binary = compiled_for("sm_90", one)
        entry = binary.asm["ptx"].partition(".entry")[2].partition(")")[0]
        taken = [int(width) for width in re.findall(r"\.param \.[a-z](\d\d)", entry)]
        assert taken == [*passed, 64, 64], "two more are Triton's own"


def test_sums_in_double_float_use_no_float64():
    """Passes over d would go at its rate: nothing d numbers long may need it, only a few numbers for each instance."""
    per_element = r"\b(?:mul|fma|div|sqrt)[\w.]*\.f64"
    counted = {}
    for call in ("alignment", "pmrl"):
        for one in resources.launches(resources.Case("sm_120", call, "fp32", 3)):
            name = one.kernel.fn.__name__
            if name not in ("gram_kernel", "vectors_kernel", "backward_kernel"):
                continue
            text = compiled_for("sm_120", one).asm["ptx"]
            loops = re.findall(r"^(\$L__BB\d+_\d+):(.*?)\bbra[.\w]*\s+\1;", text, re.MULTILINE | re.DOTALL)
            assert any("fma.rn.f32" in body for _, body in loops)
            counted[name] = sum(len(re.findall(per_element, body)) for _, body in loops)
    assert counted == dict.fromkeys(("gram_kernel", "vectors_kernel", "backward_kernel"), 0)


@pytest.mark.parametrize(("target", "multiply"), [("sm_90", "wgmma.mma_async"), ("sm_80", "mma.sync")])
def test_products_of_contrasts_wait_for_no_load(target, multiply):
    """A loop that waits for all that it has begun leaves tensor cores idle for half of the time. Whether it does is
    decided by its form: a register too many or narrower loads, and compilers give up. Of the products of what is loaded
    the first two, of one accumulator, are waited for; the last is under way while the next step begins."""
    loops = []
    for one in resources.launches(resources.Case(target, "instances", "fp32", 1)):
        if one.warps < 8:  # tiles of less than 128, for batches that wait for launches anyway
            continue
        text = compiled_for(target, one).asm["ptx"]
        bodies = re.findall(r"^(\$L__BB\d+_\d+):(.*?)\bbra[.\w]*\s+\1;", text, re.MULTILINE | re.DOTALL)
        products = [body for _, body in bodies if multiply in body]
        loops.append((one.kernel.fn.__name__, len(products)))
        for body in products:
            # hi and lo of either side: one load more is under way
            assert body.count("cp.async.commit_group") == 4
            assert re.findall(r"cp\.async\.wait_group\s+(\d+);", body) == ["4"]
            *before, last = re.split(r"wgmma\.wait_group[.\w]*\s+0;", body)
            assert len(before) == (2 if multiply.startswith("wgmma") else 0)
            assert all(multiply in part for part in (*before, last))
            assert "wgmma.wait_group" not in last
    backward = [("weights_kernel", 1), ("product_kernel", 1)]
    assert loops == [("similar_kernel", 1), *backward, *backward], "all of it at once, and by strips"


def test_similarities_are_rounded_alike_everywhere():
    """Of a row with its equal, with its partner, forward and backward: which of two products a compiler fuses with the
    sum of both is its own choice, and was not the same in all of a thread's numbers."""
    factor, names = f"0f{struct.unpack('I', struct.pack('f', kernels.SQUARE.value))[0]:08X}", set()
    for one in resources.launches(resources.Case("sm_90", "modality", "fp32", 3)):
        name = one.kernel.fn.__name__
        if name in ("prepare_kernel", "similar_kernel", "weights_kernel") and name not in names:
            names.add(name)
            text = compiled_for("sm_90", one).asm["ptx"]
            assert set(re.findall(rf"(\S+)\s+%[^;]*{factor}[^;]*;", text)) == {"fma.rn.f32"}, name
    assert len(names) == 3


@pytest.mark.parametrize("stack", [0, 8])
@pytest.mark.parametrize("k", [8, 9])
def test_the_gate_sees_spills(k, stack):
    row = resources.Row(resources.Case("sm_90", "alignment", "fp32", k), "kernel", 1, 255, stack, 0, 1.0)
    assert bool(resources.faults(row)) == (stack > 0 and k <= 8)
    assert resources.faults(row._replace(stack=0, shared=1 << 20))


def test_nothing_adds_floating_point_numbers_atomically():
    """It would add them in another order each time."""
    atomics = []
    for one in resources.launches(resources.Case("sm_90", "alignment", "fp32", 3)):
        text = compiled_for("sm_90", one).asm["ptx"]
        atomics += re.findall(r"\b(?:atom|red)\.[\w.:]+", text)
    assert atomics, "the last program of solve_kernel is found by counting"
    assert not [name for name in atomics if re.search(r"\.(f|bf)\d+", name)]


@pytest.mark.slow
def test_kernels_are_compiled_ahead_for_a_card_that_is_not_here(tmp_path):
    """Of a test of the contract: its kernels and their launchers, without the text of PTX, and its name there."""
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "cache"
    options = ("--only", "contract", "--one-in", "4000", "--seconds", "60", "--jobs", "1", "--cache", str(cache))
    done = run("tests/tools/ahead.py", str(archive), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    names = archive.with_suffix(".txt").read_text().splitlines()
    assert names
    assert all("-cuda" in name for name in names)
    with tarfile.open(archive) as tar:
        binaries = [x for x in tar.getmembers() if x.name.endswith(".cubin")]
        assert binaries
        for one in binaries:
            content = tar.extractfile(one).read()
            whole = (Path("/") / one.name).read_bytes()
            text = [(offset, length) for name, offset, length in ahead.sections(whole) if "ptx_txt" in name]
            assert text
            assert len(content) == len(whole)
            assert all(not any(content[offset : offset + length]) for offset, length in text)
            assert content[:0x200] == whole[:0x200]
        assert {".cubin", ".json"} <= {Path(x.name).suffix for x in tar.getmembers()} <= {".cubin", ".json", ".so"}
