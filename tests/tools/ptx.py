"""Compiled GPU kernels on a CPU: an interpreter of PTX, Triton's and nvcc's, that watches memory.

    python -m pytest -p tests.tools.ptx tests/contract -k triton --one-in 60

Triton's own interpreter runs the source; this runs what the compiler made of it for sm_90: fused multiply-adds,
layouts, shuffles, predicated loads and stores, barriers. As a pytest plugin it has the Triton backend take tensors of a
CPU and runs each of its launches, one program after the other, its threads in step. With ``TRITON_LIBCUDA_PATH`` at a
folder with a driver compiled from libcuda.c, kernels are launched by Triton itself, through its launcher in C, and run
here with what would go to the card; else they are called with the arguments that it would be given.

What nvcc makes of CUDA C++ runs by ``execute`` with the name of a kernel; a program is then
a thread block, and launches have one dimension. Whatever is not known raises: calls of functions that were not inlined,
floating-point atomics (sums without an order), copies in bulk, barriers of some of a program's threads.

It raises

* ``MemoryFaultError`` where a thread accesses what belongs to no tensor, or is not aligned;
* ``RaceError`` where two threads access the same byte, one of them changing it, with no barrier in between that both
  pass: shared and global memory, threads of one warp included, and other programs of the same launch. (The racecheck of
  compute-sanitizer looks at shared memory only.) A volatile read of global memory, or one by an atomic order, may find
  what another program wrote if that has fenced and then counted itself by an atomic, as where the last one adds up.
  What atomics themselves read and write is left out. And where lanes exchange registers, some of whom are elsewhere.

What it does not show: time, and orders of execution other than in step. A fused multiply-add is rounded twice, the
first time to 64 bits (float32: 53). Approximate functions are exact, so that one result can be told from another one to
the last bit; the hardware is only known by bounds. Whether results depend on that shows in ``approximating``, where
they are off by random amounts. ``counting`` counts what warps execute.

Compilers leave registers undefined where a value goes unused (the half beyond k of a packed pair, say). These hold
ones in all bits here, which is NaN in every floating-point type, so a result that depends on one shows. So does shared
or local memory that nobody wrote, and what a shuffle gets from a lane that is not there.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

WARP = 32
RAW = {"pred": np.bool_, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
TYPES = {
    **{f"{kind}{bits}": np.dtype(f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
# Generic addresses: those of global memory are its own, the others' begin at multiples of 2^60.
SPACES = ("global", "shared", "local", "param")
WINDOW = 60


class MemoryFaultError(Exception):
    pass


class RaceError(Exception):
    pass


class _NotTogether(Exception):  # noqa: N818
    """Lanes would exchange values with some that have not come: who, and what is wrong if these never come."""

    def __init__(self, lanes: np.ndarray, told: str) -> None:
        super().__init__(told)
        self.lanes = lanes


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


class Region:
    """Bytes, and who last changed and read each of them since the launch (global) or the program (shared) began."""

    def __init__(self, start: int, data: np.ndarray) -> None:
        self.start, self.data = start, data
        self.writes: np.ndarray | None = None

    def watch(self) -> None:
        """[program, thread, barriers of the program, barriers of the warp] for each byte."""
        if self.writes is None:
            self.writes = np.full((len(self.data), 4), -1, np.int32)
            self.reads = np.full((len(self.data), 4), -1, np.int32)


class Memory:
    def __init__(self, regions: Sequence[Region], where: str) -> None:
        self.regions = sorted(regions, key=lambda region: region.start)
        self.starts = [region.start for region in self.regions]
        self.where = where
        # by program, for each thread and each warp: how many barriers had been passed at its last fence that counts
        self.released: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def find(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Region, np.ndarray, np.ndarray]]:
        """(region, which of the addresses are in it, their offsets)."""
        if (addresses % np.uint64(size)).any():
            raise MemoryFaultError(f"{self.where}: an access of {size} bytes is not aligned")
        left = np.arange(len(addresses))
        while len(left):
            first = int(addresses[left[0]])
            at = bisect.bisect_right(self.starts, first) - 1
            region = self.regions[at] if at >= 0 else None
            end = 0 if region is None else region.start + len(region.data)
            if region is None or first + size > end:
                raise MemoryFaultError(f"{self.where}: {size} bytes at {first:#x} belong to nobody")
            inside = (addresses[left] >= region.start) & (addresses[left] + np.uint64(size) <= end)
            yield region, left[inside], (addresses[left[inside]] - np.uint64(region.start)).astype(np.int64)
            left = left[~inside]

    def release(self, program: int, barriers: np.ndarray, of_warp: np.ndarray) -> None:
        """Others may from now on find what threads of a program wrote before fences, of threads and warps."""
        before = self.released.get(program, (barriers, of_warp))
        self.released[program] = np.maximum(before[0], barriers), np.maximum(before[1], of_warp)

    def has_released(self, past: np.ndarray) -> np.ndarray:
        """Which writes, (n, 4), are older than a fence of that thread, or than a barrier before anyone's fence."""
        out = np.zeros(len(past), bool)
        for program in np.intersect1d(past[:, 0], list(self.released)):
            (barriers, of_warp), at = self.released[int(program)], np.flatnonzero(past[:, 0] == program)
            thread, seen = past[at, 1], past[at, 2]
            # a thread's own fence: of this interval between barriers, whether before or after it nobody knows
            out[at] = (seen <= barriers[thread]) | (seen < barriers.max()) | (past[at, 3] < of_warp[thread // WARP])
        return out


class Threads(NamedTuple):
    """Who accesses memory: threads of a program, and how many barriers they have passed."""

    program: int
    index: np.ndarray
    barriers: int
    of_warp: np.ndarray  # by warp


def _stamps(threads: Threads, who: np.ndarray) -> np.ndarray:
    index = threads.index[who]
    columns = np.full_like(index, threads.program), index, np.full_like(index, threads.barriers)
    return np.stack([*columns, threads.of_warp[index // WARP]], 1).astype(np.int32)


def _unordered(past: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Whether an access of the past, (..., 4), and one of now by another thread have no barrier in between."""
    somebody = past[..., 0] >= 0
    other_program = past[..., 0] != now[..., 0]
    other_thread = past[..., 1] != now[..., 1]
    other_warp = (past[..., 1] // WARP != now[..., 1] // WARP) | (past[..., 1] < -1)
    since_program = past[..., 2] != now[..., 2]
    since_warp = past[..., 3] != now[..., 3]
    within = other_thread & ~since_program & (other_warp | ~since_warp)
    return somebody & (other_program | within)


def load(memory: Memory, addresses: np.ndarray, size: int, threads: Threads | None, strong: bool = False) -> np.ndarray:
    """Bytes (n, size). Without threads nobody watches; strong reads find what other programs have released."""
    out = np.empty((len(addresses), size), np.uint8)
    for region, who, offsets in memory.find(addresses, size):
        at = offsets[:, None] + np.arange(size)
        out[who] = region.data[at]
        if threads is None:
            continue
        region.watch()
        now = np.broadcast_to(_stamps(threads, who)[:, None], (*at.shape, 4))
        racing = _unordered(region.writes[at], now)
        if strong and racing.any():
            racing[racing] = ~memory.has_released(region.writes[at][racing])
        if racing.any():
            link = "with no fence and atomic in between" if strong else "with no barrier in between"
            raise RaceError(_told(memory, "reads", now[racing][0], "what", region.writes[at][racing][0], "wrote", link))
        past = region.reads[at]
        again = (past[..., 0] == now[..., 0]) & (past[..., 2] == now[..., 2]) & (past[..., 1] != now[..., 1])
        stamps = now.copy()
        stamps[..., 1][again] = -2  # more than one: taken for threads of another warp, whoever asks
        same_warp = again & (past[..., 1] >= 0) & (past[..., 1] // WARP == now[..., 1] // WARP)
        stamps[..., 1][same_warp] = now[..., 1][same_warp]  # of one warp, the last one speaks for all
        region.reads[at] = stamps
    return out


def store(memory: Memory, addresses: np.ndarray, values: np.ndarray, threads: Threads | None) -> None:
    """Bytes (n, size). What leaves a byte as it is disturbs nobody."""
    size = values.shape[1]
    for region, who, offsets in memory.find(addresses, size):
        at = offsets[:, None] + np.arange(size)
        if threads is not None:
            region.watch()
            now = np.broadcast_to(_stamps(threads, who)[:, None], (*at.shape, 4))
            changed = region.data[at] != values[who]
            for past, what in ((region.writes[at], "wrote"), (region.reads[at], "read")):
                racing = changed & _unordered(past, now)
                if racing.any():
                    link = "with no barrier in between"
                    raise RaceError(_told(memory, "writes", now[racing][0], "where", past[racing][0], what, link))
            order = np.argsort(at.ravel(), kind="stable")
            flat, bytes_ = at.ravel()[order], values[who].ravel()[order]
            twice = (flat[1:] == flat[:-1]) & (bytes_[1:] != bytes_[:-1])
            if twice.any():
                raise RaceError(f"{memory.where}: two threads write different bytes to one address at once")
            region.writes[at[changed]] = now[changed]
        region.data[at] = values[who]


def _told(memory: Memory, verb: str, now: np.ndarray, what: str, past: np.ndarray, did: str, link: str) -> str:
    def name(stamp: np.ndarray) -> str:
        return f"thread {stamp[1]} of program {stamp[0]}" if stamp[1] >= 0 else f"several threads of program {stamp[0]}"

    return f"{memory.where}: {name(now)} {verb} {what} {name(past)} {did}, {link}"


# ------------------------------------------------------------------------------------------------
# Code
# ------------------------------------------------------------------------------------------------

Run = Callable[["Program", "np.ndarray | None"], Any]


class Instruction(NamedTuple):
    text: str
    line: str  # of the source
    opcode: str
    name: str  # the part of the opcode before the first dot
    predicate: str | None
    wanted: bool
    run: Run | None  # None for what changes the flow
    target: str | None  # of a branch; the lanes that a barrier of a warp names


class Entry(NamedTuple):
    """A kernel as it stands in a module."""

    parameters: str
    directives: str
    body: str


class Module(NamedTuple):
    entries: dict[str, Entry]
    files: dict[str, str]  # of the source, by number
    variables: dict[str, np.ndarray]  # bytes in global memory, constants among them; they live as long as the module
    dynamic: list[str]  # names for the shared memory that a launch adds


class Code(NamedTuple):
    name: str
    parameters: dict[str, int]  # their bytes
    registers: dict[str, Any]  # name, or prefix -> dtype
    symbols: dict[str, int]  # addresses of names, each in its state space
    variables: list[np.ndarray]
    shared: int  # bytes that are declared
    local: int  # bytes of each thread
    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int | None  # at most, or exactly; None: as launched
    exactly: bool


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


_DECLARATION = re.compile(
    r"^[ \t]*((?:\.(?:visible|extern|weak|common)\s+)*)\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*([^;]*))?;",
    re.MULTILINE,
)


class _Declared(NamedTuple):
    external: bool
    align: int
    dtype: np.dtype
    name: str
    size: int
    values: list[str]


def _declared(text: str, *spaces: str) -> list[_Declared]:
    """The variables of state spaces."""
    found = []
    for how, space, align, kind, name, count, values in _DECLARATION.findall(text):
        if space in spaces:
            dtype, given = TYPES[kind], re.findall(r"[^\s,{}]+", values)
            size = dtype.itemsize * int(count or 1)
            found.append(_Declared("extern" in how, int(align or dtype.itemsize), dtype, name, size, given))
    return found


def _laid_out(variables: Sequence[_Declared]) -> tuple[dict[str, int], int]:
    """Their offsets, one behind the other, and what they take together."""
    offsets, size = {}, 0
    for one in variables:
        offsets[one.name] = _rounded_up(size, one.align)
        size = offsets[one.name] + one.size
    return offsets, size


def _closing(text: str, at: int) -> int:
    """Behind the brace that closes the one that ends at ``at``."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise ValueError("a brace is not closed")


@functools.cache
def module(text: str) -> Module:
    text = re.sub(r"//[^\n]*", "", text)
    files = {
        m[1]: m[2].rpartition("/")[2] for m in re.finditer(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", text, re.MULTILINE)
    }
    entries, outside, at = {}, [], 0
    for head in re.finditer(r"\.(entry|func)\b([^{;]*)\{", text):
        outside.append(text[at : head.start()])
        at = _closing(text, head.end())
        if head[1] == "entry":
            found = re.fullmatch(r"\s*([\w$]+)\s*(?:\((.*)\))?([^)]*)", head[2], re.DOTALL)
            entries[found[1]] = Entry(found[2] or "", found[3], text[head.end() : at - 1])
    around = "".join([*outside, text[at:]])
    variables = {}
    for one in _declared(around, "global", "const"):
        data = np.zeros(one.size // one.dtype.itemsize, one.dtype)
        data[: len(one.values)] = [_literal(value, one.dtype) for value in one.values]
        variables[one.name] = data.view(np.uint8)
    shared = _declared(around, "shared")
    if not all(one.external for one in shared):
        raise NotImplementedError("shared memory of several kernels")
    return Module(entries, files, variables, [one.name for one in shared])


@functools.cache
def parse(text: str, name: str | None = None) -> Code:
    """A kernel of a module: the only one, or that named."""
    whole = module(text)
    if name is None:
        (name,) = whole.entries
    entry = whole.entries[name]
    parameters, places, size = {}, {}, 0
    for part in filter(None, map(str.strip, entry.parameters.split(","))):
        # .param [.align 8] .u64 [.ptr .global .align 1] name, or .b8 name[bytes] for a struct
        words = part.split()
        kind = next(word[1:] for word in words if word[1:] in TYPES)
        called, count = re.fullmatch(r"([\w$]+)(?:\[(\d+)\])?", words[-1]).groups()
        parameters[called] = TYPES[kind].itemsize * int(count or 1)
        places[called] = size
        size = _rounded_up(size + parameters[called], 16)
    threads = re.search(r"\.(reqntid|maxntid)\s+([\d, ]+)", entry.directives)
    shared, static = _laid_out(_declared(entry.body, "shared"))
    local, depot = _laid_out(_declared(entry.body, "local"))
    static = _rounded_up(static, 16) if whole.dynamic else static
    symbols = {called: data.ctypes.data for called, data in whole.variables.items()}
    symbols |= places | shared | local | dict.fromkeys(whole.dynamic, static)
    registers, instructions, labels = _statements(entry.body, whole.files)
    return Code(
        name,
        parameters,
        registers,
        symbols,
        list(whole.variables.values()),
        static,
        _rounded_up(depot, 16),
        instructions,
        labels,
        int(np.prod([int(x) for x in threads[2].split(",")])) if threads else None,
        bool(threads) and threads[1] == "reqntid",
    )


def _statements(body: str, files: dict[str, str]) -> tuple[dict[str, Any], list[Instruction], dict[str, int]]:
    """Registers, instructions and labels. Names that a { } declares are its own."""
    registers: dict[str, Any] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes: list[dict[str, str]] = []
    line = ""
    body = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)[^\n]*$", r"@line \1 \2;", body, flags=re.MULTILINE)
    body = re.sub(r"^\s*\.(file|section)\b[^\n]*$", "", body, flags=re.MULTILINE)
    for statement in re.split(r";|(?<=:)\s*\n", body):
        statement = " ".join(statement.split())
        while found := re.match(r"\{\s*|\}\s*|(\$\w+):\s*", statement):
            if found[1]:
                labels[found[1]] = len(instructions)
            elif found[0][0] == "{":
                scopes.append({})
            else:
                scopes.pop()
            statement = statement[found.end() :]
        if declared := re.match(r"\.reg\s+\.(\w+)\s+", statement):
            kind = RAW["pred" if declared[1] == "pred" else declared[1].lstrip("bfsu")]
            for name in statement[declared.end() :].replace(" ", "").split(","):
                own = name.partition("<")[0]  # %r<5> are %r0 ... %r4
                if scopes and own == name:
                    own = scopes[-1][name] = f"%{name.lstrip('%')}.{len(registers)}."
                registers[own] = kind
        elif statement.startswith("@line"):
            _, file, number = statement.split()
            line = f"{files.get(file)}:{number}"
        elif statement and not re.match(r"\.(pragma|shared|local)\b", statement):
            for scope in reversed(scopes):
                for name, own in scope.items():
                    statement = re.sub(rf"(?<![\w.%$]){re.escape(name)}(?![\w.])", own, statement)
            instructions.append(_decoded(statement, line))
    return registers, instructions, labels


def _decoded(statement: str, line: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%[\w.]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if not found:
        raise NotImplementedError(statement)
    negated, predicate, opcode, rest = found.groups()
    arguments = [a.strip() for a in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
    name, *parts = opcode.replace("::cta", "").split(".")  # this block's shared memory: there is no other one here
    flow = {"bra": "bra", "ret": "ret", "exit": "ret"}.get(name)
    if opcode in ("bar.sync", "barrier.sync", "barrier.cta.sync"):  # of all threads
        flow = "bar"
    elif opcode == "bar.warp.sync":
        flow = "warp"
    if flow:
        target = " ".join(arguments) if flow in ("bra", "warp", "bar") else None
        return Instruction(statement, line, opcode, flow, predicate, not negated, None, target)
    if name not in OPERATIONS:
        raise NotImplementedError(statement)
    try:
        run = OPERATIONS[name](parts, arguments)
    except KeyError as error:  # a type or a comparison
        raise NotImplementedError(f"{statement}: {error}") from error
    return Instruction(statement, line, opcode, name, predicate, not negated, run, None)


@functools.lru_cache(maxsize=1 << 14)
def _literal(operand: str, dtype: np.dtype) -> Any:
    """Of floating-point types, the bits."""
    if operand[:2] in ("0d", "0f"):
        bits = np.uint64(int(operand[2:], 16)) if operand[1] == "d" else np.uint32(int(operand[2:], 16))
        return bits.view(dtype)
    bits = 8 * dtype.itemsize
    return np.array(int(operand.rstrip("U"), 0) & ((1 << bits) - 1), f"uint{bits}").view(dtype)[()]


def kind(opcode: str) -> str:
    """What an instruction is of, to count by."""
    name, *parts = opcode.split(".")
    last = parts[-1] if parts else ""
    if name in ("ld", "st"):
        space = next((space for space in (*SPACES, "const") if space in parts), "generic").replace("param", "parameter")
        return f"{space} {'load' if name == 'ld' else 'store'}"
    for kinds, names in KINDS.items():
        if name in names:
            return kinds
    floating = {"f64": "float64", "f32": "float32", "f32x2": "float32", "f16": "half", "f16x2": "half", "bf16": "half"}
    if name == "cvt":
        return "float64 conversion" if "f64" in parts else "conversion"
    of = floating.get(last, "integer")
    return f"{of} function" if name in ("div", "rcp", "sqrt", "rsqrt", "ex2", "lg2") and of != "integer" else of


KINDS = {
    "shuffle": ("shfl", "vote", "redux"),
    "atomic": ("atom", "red"),
    "barrier": ("bar", "barrier"),
    "fence": ("membar", "fence"),
    "branch": ("bra", "ret", "exit"),
    "move": ("mov", "selp", "cvta", "prmt"),
    "matrix": ("mma", "wgmma"),
    "matrix load": ("ldmatrix",),
    "matrix store": ("stmatrix",),
    "copy": ("cp",),
}


# ------------------------------------------------------------------------------------------------
# Running a program
# ------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A wgmma on its way: its group, its accumulators and what they held, and what computes it of that."""

    group: int
    into: tuple[str, ...]
    before: np.ndarray
    compute: Callable[[np.ndarray], np.ndarray]


class Program:
    """The state of one program (thread block) of a launch."""

    def __init__(
        self, code: Code, parameters: np.ndarray, memory: Memory, shared: int, threads: int, at: int, of: int
    ) -> None:
        T = threads
        self.code, self.memory, self.at = code, memory, at
        self.parameters = Memory([Region(0, parameters)], f"{code.name}, parameters")
        self.shared = Memory(
            [Region(0, np.full(max(code.shared + shared, 16), 0xFF, np.uint8))], f"{code.name}, shared memory"
        )
        self.local = Memory([Region(0, np.full(T * code.local, 0xFF, np.uint8))], f"{code.name}, local memory")
        self.registers: dict[str, np.ndarray] = {}
        self.special = {"%tid.x": np.arange(T), "%ctaid.x": at, "%ntid.x": T, "%nctaid.x": of}
        self.special |= {f"%{name}.{axis}": 0 for name in ("tid", "ctaid") for axis in "yz"}
        self.special |= {f"%{name}.{axis}": 1 for name in ("ntid", "nctaid") for axis in "yz"}
        self.special |= {"%laneid": np.arange(T) % WARP, "%warpid": np.arange(T) // WARP}
        self.special["%lanemask_lt"] = (1 << np.arange(T) % WARP) - 1
        self.thread, self.barriers, self.of_warp = np.arange(T), 0, np.zeros(_rounded_up(T, WARP) // WARP, np.int32)
        self.where = np.zeros(T, np.int64)  # the next instruction; -1: done
        self.fenced, self.fenced_of_warp = np.full(T, -1), np.full(T, -1)  # barriers passed by then
        self.executed = np.zeros(len(code.instructions), np.int64)  # by warps, where somebody counts
        # cp.async: how many groups each thread has committed; (threads, their groups, addresses, bytes) on their way
        self.groups = np.zeros(T, np.int64)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        # wgmma: how many groups were committed, and products on their way, in order
        self.products_committed = 0
        self.products: list[Product] = []

    def _kind(self, register: str) -> Any:
        kinds = self.code.registers
        return kinds.get(register) or kinds[register.rstrip("0123456789")]

    def _register(self, operand: str) -> np.ndarray:
        """The bits in a declared register; ones as long as nobody has written to it."""
        if operand not in self.registers:
            self.registers[operand] = ~np.zeros(len(self.thread), self._kind(operand))
        return self.registers[operand]

    def get(self, operand: str, dtype: np.dtype) -> Any:
        """The value of a register, special register, symbol or literal, an array [T] or a scalar."""
        if operand[0] == "%":
            if operand in self.special:
                return np.asarray(self.special[operand], np.uint32).astype(dtype)
            raw = self._register(operand)
            if raw.dtype.itemsize != dtype.itemsize:
                return raw.astype(f"uint{8 * dtype.itemsize}").view(dtype)
            return raw.view(dtype)
        if operand in self.code.symbols:
            return dtype.type(self.code.symbols[operand])
        return _literal(operand, dtype)

    def predicate(self, operand: str) -> Any:
        if operand[0] == "!":
            return ~self._register(operand[1:])
        if operand[0] == "%":
            return self._register(operand)
        return bool(int(operand, 0) & 1)

    def put(self, operand: str, value: Any, active: np.ndarray | None) -> None:
        if operand == "_":
            return
        kind, T = self._kind(operand), len(self.thread)
        raw = np.asarray(value)
        if kind is np.bool_:
            raw = raw.astype(kind, copy=False)
        elif raw.dtype.type is not kind:
            width = np.dtype(kind).itemsize
            if raw.dtype.itemsize != width:
                if raw.dtype.kind == "f":
                    raw = np.ascontiguousarray(raw).view(f"uint{8 * raw.dtype.itemsize}").reshape(raw.shape)
                raw = raw.astype(f"{'int' if raw.dtype.kind == 'i' else 'uint'}{8 * width}")
            raw = raw.view(kind)
        if raw.shape != (T,):
            raw = np.full(T, raw)
        self.registers[operand] = raw if active is None else np.where(active, raw, self._register(operand))

    def threads(self, active: np.ndarray | None) -> Threads:
        index = self.thread if active is None else self.thread[active]
        return Threads(self.at, index, self.barriers, self.of_warp)

    def fence(self, threads: Threads) -> None:
        self.fenced[threads.index] = self.barriers
        self.fenced_of_warp[threads.index] = self.of_warp[threads.index // WARP]

    def release(self, threads: Threads) -> None:
        """An atomic after fences: those of the same threads, and those of others that a barrier has followed."""
        count = self.fenced < self.barriers
        count[threads.index] = True
        of_warp = np.full(len(self.of_warp), -1)
        np.maximum.at(of_warp, self.thread // WARP, np.where(count, self.fenced_of_warp, -1))
        if (counting := np.where(count, self.fenced, -1)).max() >= 0:
            self.memory.release(self.at, counting, of_warp)

    def _warps(self, some: np.ndarray | None) -> int:
        return len(self.of_warp) if some is None else np.count_nonzero(np.bincount(self.thread[some] // WARP))

    def run(self) -> None:
        """All threads in step as long as they agree; else whoever is furthest behind goes first. Lanes wait for those
        that they exchange values with."""
        T = len(self.thread)
        told = ""
        code, labels, where = self.code.instructions, self.code.labels, self.where
        waiting, barrier = np.full(T, "", "U4"), np.zeros(T, np.int8)
        while True:
            ready = (where >= 0) & (waiting == "")
            if not ready.any():
                if not (where >= 0).any():
                    break
                if (waiting == "lane").any():
                    raise RaceError(told)
                self._release(where, waiting, barrier)
                continue
            pc = int(where[ready].min())
            active = ready & (where == pc)
            met = (waiting == "lane") & (where == pc)
            if met.any():
                met &= np.isin(self.thread // WARP, self.thread[active] // WARP)
                waiting[met] = ""
                active |= met
            others = (ready | (waiting == "lane")) & ~active & (where > pc)
            joined = int(where[others].min(initial=len(code) + 1))  # where others are met
            everyone = bool(active.all())
            while pc < joined:
                instruction = code[pc]
                chosen, mask = active, None if everyone else active
                if instruction.predicate is not None:
                    chosen = active & (self._register(instruction.predicate) == instruction.wanted)
                    mask = None if everyone and chosen.all() else chosen
                if _counters:
                    self.executed[pc] += self._warps(mask if instruction.run else active)
                pc += 1
                if instruction.run is None:
                    break
                if mask is None or mask.any():
                    where_it_is = f"{self.code.name}, program {self.at}, {instruction.line}: {instruction.text}"
                    try:
                        instruction.run(self, mask)
                    except _NotTogether as error:
                        if not (waiting == "lane").any():  # what is wrong, if something is, is wrong with the first
                            told = f"{error}\n{where_it_is}"
                        waiting[error.lanes] = "lane"
                        pc -= 1
                        break
                    except Exception as error:
                        raise type(error)(f"{error}\n{where_it_is}") from error
            where[active] = pc
            if (waiting[active] == "lane").any():
                continue
            if instruction.name == "bra":
                where[chosen] = labels[instruction.target]
            elif instruction.name == "ret":
                where[chosen] = -1
            elif instruction.run is None:
                waiting[chosen] = instruction.name
                if instruction.name == "bar":
                    self._wait_at(instruction, chosen, barrier, where)
                if instruction.name == "warp" and (self.get(instruction.target, TYPES["u32"]) != EVERYONE).any():
                    raise NotImplementedError(f"{self.code.name}, a barrier of some lanes: {instruction.text}")
        for count, by in _counters:
            for instruction, times in zip(self.code.instructions, self.executed, strict=True):
                if times:
                    count[by(instruction.opcode)] += int(times)

    def _wait_at(self, instruction: Instruction, some: np.ndarray, barrier: np.ndarray, where: np.ndarray) -> None:
        """Barrier 0 is for all that have not ended; one that names a number of threads, for all that there are."""
        number, *threads = (instruction.target or "").split()
        barrier[some] = self.get(number, TYPES["u32"])[some] if number.startswith("%") else int(number)
        if threads and (int(threads[0]) != len(where) or (where < 0).any()):
            raise NotImplementedError(f"{self.code.name}, a barrier of some threads: {instruction.text}")

    def _release(self, where: np.ndarray, waiting: np.ndarray, barrier: np.ndarray) -> None:
        alive = where >= 0
        if (waiting[alive] == "bar").all() and np.ptp(barrier[alive]) == 0:
            self.barriers += 1
            waiting[:] = ""
            return
        released = False
        for warp in range(len(self.of_warp)):
            mine = alive & (self.thread // WARP == warp)
            if mine.any() and (waiting[mine] == "warp").all():
                self.of_warp[warp] += 1
                waiting[mine] = ""
                released = True
        if not released:
            raise RaceError(f"{self.code.name}: threads wait for one another at different barriers")


# ------------------------------------------------------------------------------------------------
# Operations: each takes the parts of the opcode after its name and the operands
# ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[list[str], list[str]], Run]] = {}
EVERYONE = np.uint32(0xFFFFFFFF)  # of the lanes of a warp
_counters: list[tuple[Counter, Callable[[str], Hashable]]] = []
_error: tuple[float, np.random.Generator] | None = None  # of approximate functions


@contextlib.contextmanager
def counting(by: Callable[[str], Hashable] = kind) -> Iterator[Counter]:
    """How many instructions warps execute meanwhile: the ones that a thread of them executes, and all branches.

    By ``kind``, or by another function of opcodes: ``str`` counts each one by itself."""
    _counters.append((Counter(), by))
    try:
        yield _counters[-1][0]
    finally:
        _counters.pop()


@contextlib.contextmanager
def approximating(error: float = 2.0**-21.5, seed: int = 0) -> Iterator[None]:
    """Approximate functions are off by random relative errors up to this one meanwhile.

    The hardware's are within 2 units in the last place of float32 (div.full, div.approx) or 1 (rcp, sqrt, rsqrt)."""
    global _error
    _error = error, np.random.default_rng(seed)
    try:
        yield
    finally:
        _error = None


def operation(*names: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        for name in names:
            OPERATIONS[name] = lambda parts, args, name=name: make(name, parts, args)
        return make

    return register


def _split(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _fma(a: Any, b: Any, c: Any) -> Any:
    wide = np.float64 if a.dtype.itemsize < 8 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c).astype(a.dtype)


ENDS = {"rz": 0, "rm": -np.inf, "rp": np.inf}


def _toward(x: Any, dtype: np.dtype, mode: str) -> Any:
    """Rounded to a smaller type: rn to the nearest, rz to zero, rm down, rp up."""
    near = x.astype(dtype)
    if mode == "rn":
        return near
    beyond = {"rz": np.abs(near) > np.abs(x), "rm": near > x, "rp": near < x}[mode]
    return np.where(beyond, np.nextafter(near, dtype.type(ENDS[mode])), near)


def _quotient(a: Any, b: Any) -> Any:
    """Of integers, toward zero; ones in all bits where there is none."""
    by = np.where(b == 0, b.dtype.type(1), b)
    down = a // by
    found = down + ((down * by != a) & ((a < 0) != (by < 0))).astype(a.dtype)
    return np.where(b == 0, ~b.dtype.type(0), found)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,
    "max": np.fmax,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _fma,
    "neg": lambda a: a * a.dtype.type(-1) if a.dtype.kind == "f" else np.negative(a),
    "abs": np.abs,
    "rcp": lambda a: a.dtype.type(1) / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    "ex2": np.exp2,
    "lg2": np.log2,
    "copysign": lambda a, b: np.copysign(b, a),
    "rem": lambda a, b: a - _quotient(a, b) * b,
}
_KNOWN = {"rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "NaN"}


EXACTLY: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
    "rcp": lambda a: 1 / a,
}


def _directed(name: str, values: Sequence[np.ndarray], near: np.ndarray, mode: str) -> np.ndarray:
    """From what is rounded to the nearest: the next number, where the exact result is on the other side."""
    found = np.array(near)
    shape = np.broadcast_shapes(*(v.shape for v in values))
    for at, *given in zip(np.ndindex(shape), *(np.broadcast_to(v, shape).ravel() for v in values), strict=True):
        if np.isfinite(given).all() and not (name in ("div", "rcp") and given[-1] == 0):
            exact, rounded = EXACTLY[name](*(Fraction(float(x)) for x in given)), float(near[at])
            if {"rz": abs(rounded) > abs(exact), "rm": rounded > exact, "rp": rounded < exact}[mode]:
                found[at] = np.nextafter(near[at], near.dtype.type(ENDS[mode]))
    return found


@operation(*(name for name in ARITHMETIC if name != "mul"))
def _arithmetic(name: str, parts: list[str], args: list[str]) -> Run:
    function, kind, flush = ARITHMETIC[name], parts[-1], "ftz" in parts
    if kind in ("f32x2", "f16x2", "s16x2"):
        half = TYPES[kind[:3]]
        both = np.dtype(f"uint{16 * half.itemsize}")

        def pairs(p: Program, m: np.ndarray | None) -> None:
            wide = [np.broadcast_to(p.get(a, both), len(p.thread)) for a in args[1:]]
            halves = [np.ascontiguousarray(w).view(half).reshape(-1, 2) for w in wide]
            found = np.stack([function(*(h[:, i] for h in halves)) for i in (0, 1)], 1).astype(half)
            p.put(args[0], np.ascontiguousarray(found).view(both)[:, 0], m)

        return pairs
    dtype = TYPES[kind]
    mode = next((part for part in parts if part in ("rz", "rm", "rp")), "rn")
    saturated, approximate = "sat" in parts, "approx" in parts or "full" in parts
    if dtype.kind != "f" and name == "div":
        function = _quotient
    known = not set(parts[:-1]) - _KNOWN and (dtype.kind == "f" or len(parts) == 1)
    if not known or (mode != "rn" and name not in EXACTLY):
        raise NotImplementedError(".".join([name, *parts]))
    if "NaN" in parts:
        function = {"min": np.minimum, "max": np.maximum}[name]

    def run(p: Program, m: np.ndarray | None) -> None:
        values = [np.asarray(p.get(a, dtype)) for a in args[1:]]
        if flush:
            values = [_flushed(v) for v in values]
        found = np.asarray(function(*values), dtype)
        if mode != "rn":
            found = _directed(name, values, found, mode)
        if approximate and _error is not None:
            relative, random = _error
            found = (found * (1 + relative * random.uniform(-1, 1, len(p.thread)))).astype(dtype)
        if saturated:
            found = np.where(np.isnan(found), dtype.type(0), np.clip(found, 0, 1))
        p.put(args[0], _flushed(found) if flush else found, m)

    return run


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


@operation("mul", "mad")
def _multiply(name: str, parts: list[str], args: list[str]) -> Run:
    if parts[-1].startswith("f"):
        return _arithmetic("mul", parts, args)
    dtype = TYPES[parts[-1]]
    wide = np.dtype(f"{'int' if dtype.kind == 'i' else 'uint'}{16 * dtype.itemsize}") if "wide" in parts else dtype
    if set(parts[:-1]) - {"lo", "hi", "wide"}:
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        a, b = (np.asarray(p.get(x, dtype)).astype(object if "hi" in parts else wide) for x in args[1:3])
        found = a * b
        if "hi" in parts:  # of Python's integers
            found = np.asarray(found >> 8 * dtype.itemsize).astype(dtype)
        if name == "mad":
            found = found + p.get(args[3], wide)
        p.put(args[0], np.asarray(found, wide), m)

    return run


@operation("and", "or", "xor", "not")
def _logic(name: str, parts: list[str], args: list[str]) -> Run:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[name]

    def run(p: Program, m: np.ndarray | None) -> None:
        read = p.predicate if parts[-1] == "pred" else lambda a: p.get(a, TYPES[parts[-1]])
        p.put(args[0], function(*(read(a) for a in args[1:])), m)

    return run


@operation("shl", "shr")
def _shift(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    bits = 8 * dtype.itemsize

    def run(p: Program, m: np.ndarray | None) -> None:
        a, by = np.asarray(p.get(args[1], dtype)), np.asarray(p.get(args[2], TYPES["u32"])).astype(np.int64)
        less = np.minimum(by, bits - 1).astype(dtype)
        found = np.left_shift(a, less) if name == "shl" else np.right_shift(a, less)
        gone = found >> dtype.type(bits - 1) if name == "shr" and dtype.kind == "i" else np.zeros_like(found)
        p.put(args[0], np.where(by < bits, found, gone).astype(dtype), m)

    return run


@operation("bfe")
def _field(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    bits = 8 * dtype.itemsize

    def run(p: Program, m: np.ndarray | None) -> None:
        a = np.asarray(p.get(args[1], dtype))
        start, length = (np.asarray(p.get(x, TYPES["u32"])).astype(np.int64) & 255 for x in args[2:4])
        above = np.clip(bits - start - length, 0, bits - 1)  # of what lies beyond, it has the sign
        found = (a << above.astype(dtype)) >> np.minimum(above + start, bits - 1).astype(dtype)
        p.put(args[0], np.where((length == 0) | ((start >= bits) & (a >= 0)), 0, found).astype(dtype), m)

    return run


@operation("bfi")
def _insert(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = np.dtype(f"uint{8 * TYPES[parts[-1]].itemsize}")
    bits = 8 * dtype.itemsize

    def run(p: Program, m: np.ndarray | None) -> None:
        a, b = (np.asarray(p.get(x, dtype)) for x in args[1:3])
        start, length = (np.asarray(p.get(x, TYPES["u32"])).astype(np.int64) & 255 for x in args[3:5])
        ones = np.where(length == 0, 0, ~dtype.type(0) >> np.clip(bits - length, 0, bits - 1).astype(dtype))
        by = np.minimum(start, bits - 1).astype(dtype)
        mask = np.where(start < bits, ones.astype(dtype) << by, 0).astype(dtype)
        p.put(args[0], (a << by) & mask | b & ~mask, m)

    return run


@operation("popc", "clz", "brev", "bfind")
def _bits(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    raw, last = np.dtype(f"uint{8 * dtype.itemsize}"), 8 * dtype.itemsize - 1

    def run(p: Program, m: np.ndarray | None) -> None:
        a = np.asarray(p.get(args[1], dtype))
        a = np.where(a < 0, ~a, a).view(raw) if name == "bfind" else a.view(raw)
        ones = [(a >> raw.type(bit)) & raw.type(1) for bit in range(last + 1)]
        if name == "brev":
            return p.put(args[0], sum(one << raw.type(last - bit) for bit, one in enumerate(ones)), m)
        if name == "popc":
            return p.put(args[0], sum(one.astype(np.uint32) for one in ones), m)
        top = np.max([np.where(one, bit, -1) for bit, one in enumerate(ones)], 0)
        found = last - top if name == "clz" or ("shiftamt" in parts) else top
        return p.put(args[0], np.where((top < 0) & (name == "bfind"), -1, found).astype(np.int32), m)

    return run


@operation("lop3")
def _lookup(name: str, parts: list[str], args: list[str]) -> Run:
    """Any function of three bits, by its eight values."""
    if parts != ["b32"]:
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        inputs, table = [np.asarray(p.get(x, TYPES["u32"])) for x in args[1:4]], int(args[4], 0)
        found = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                a, b, c = (x if row >> 2 - at & 1 else ~x for at, x in enumerate(inputs))
                found = found | a & b & c
        p.put(args[0], found, m)

    return run


@operation("shf")
def _funnel(name: str, parts: list[str], args: list[str]) -> Run:
    """32 bits of 64."""

    def run(p: Program, m: np.ndarray | None) -> None:
        low, high, by = (np.asarray(p.get(x, TYPES["u32"])).astype(np.uint64) for x in args[1:4])
        by = by & np.uint64(31) if "wrap" in parts else np.minimum(by, np.uint64(32))
        both = high << np.uint64(32) | low
        found = both << by >> np.uint64(32) if parts[0] == "l" else both >> by
        p.put(args[0], (found & np.uint64(EVERYONE)).astype(np.uint32), m)

    return run


@operation("prmt")
def _permute(name: str, parts: list[str], args: list[str]) -> Run:
    if parts != ["b32"]:
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        a, b, how = (np.broadcast_to(p.get(x, TYPES["u32"]), len(p.thread)) for x in args[1:])
        found = np.zeros(len(p.thread), np.uint32)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        for at in range(4):
            choice = (how >> np.uint32(4 * at)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
            byte = np.where(choice & 8, np.where(byte & np.uint64(128), 255, 0), byte)  # its sign, eight times
            found |= byte.astype(np.uint32) << np.uint32(8 * at)
        p.put(args[0], found, m)

    return run


@operation("selp")
def _select(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]

    def run(p: Program, m: np.ndarray | None) -> None:
        p.put(args[0], np.where(p.predicate(args[3]), p.get(args[1], dtype), p.get(args[2], dtype)), m)

    return run


def _unordered_or(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # ordered: false where one is NaN
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
COMPARISONS |= {f"{name}u": _unordered_or(COMPARISONS[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@operation("setp")
def _compare(name: str, parts: list[str], args: list[str]) -> Run:
    if len([part for part in parts if part != "ftz"]) != 2:
        raise NotImplementedError(".".join([name, *parts]))
    dtype, function = TYPES[parts[-1]], COMPARISONS[parts[0]]

    def run(p: Program, m: np.ndarray | None) -> None:
        p.put(args[0], function(p.get(args[1], dtype), p.get(args[2], dtype)), m)

    return run


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype == np.float64:  # in one rounding: to float32 such that no tie is made or lost
        near = _toward(x, TYPES["f32"], "rz")
        x = (near.view(np.uint32) | (near != x)).view(np.float32)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


ROUNDING = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}


TF32 = np.uint32(0xFFFFE000)  # the bits of a float32 that tensor cores look at


def _to_tf32(bits: np.ndarray) -> np.ndarray:
    """The nearest one, of two the larger; what is not finite stays so."""
    nearest = (bits + np.uint32(0x1000)) & TF32
    return np.where(bits & np.uint32(0x7F800000) == 0x7F800000, bits, nearest)


@operation("cvt")
def _convert(name: str, parts: list[str], args: list[str]) -> Run:
    to, origin = parts[-2:]
    if parts == ["rna", "tf32", "f32"]:
        return lambda p, m: p.put(args[0], _to_tf32(np.asarray(p.get(args[1], TYPES["u32"]))), m)
    rounding = next((ROUNDING[part] for part in parts if part in ROUNDING), None)
    mode = next((part for part in parts if part in ("rn", "rz", "rm", "rp")), "rn")
    halves = "bf16" in to or to == "f16x2"
    if (
        set(parts[:-2]) - {*ROUNDING, "rn", "rz", "rm", "rp", "ftz", "sat"}
        or (mode != "rn" and (halves or origin[0] != "f" or to[0] != "f"))
        or ("sat" in parts and to not in ("f32", "f64"))
        or {to, origin} - {*TYPES, "bf16", "bf16x2", "f16x2"}
    ):
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        if to in ("bf16x2", "f16x2"):
            both = [np.asarray(p.get(a, TYPES["f32"])) for a in args[1:]]
            half = _to_bfloat16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            high, low = (half(x).astype(np.uint32) for x in both)
            return p.put(args[0], high << np.uint32(16) | low, m)
        if origin == "bf16":
            x = (np.asarray(p.get(args[1], TYPES["u16"])).astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            x = np.asarray(p.get(args[1], TYPES[origin]))
        if to == "bf16":
            return p.put(args[0], _to_bfloat16(x), m)
        if "ftz" in parts and x.dtype == np.float32:
            x = _flushed(x)
        dtype = TYPES[to]
        if rounding is not None:
            x = rounding(x)
        if x.dtype.kind == "f" and dtype.kind in "iu":  # saturates; NaN is 0
            bounds = np.iinfo(dtype)
            inside = np.where(np.isnan(x), 0, np.clip(x, float(bounds.min), float(bounds.max)))
            found = np.where(inside >= 2.0 ** (8 * dtype.itemsize - (dtype.kind == "i")), bounds.max, 0)
            small = inside < 2.0 ** (8 * dtype.itemsize - (dtype.kind == "i"))
            return p.put(args[0], np.where(small, np.where(small, inside, 0).astype(dtype), found).astype(dtype), m)
        x = _toward(x, dtype, mode)
        if "sat" in parts:
            x = np.where(np.isnan(x), dtype.type(0), np.clip(x, 0, 1))
        p.put(args[0], x, m)
        return None

    return run


@operation("cvta")
def _generic(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    (space,) = set(parts) & {*SPACES, "const"}
    window = np.uint64((0 if space == "const" else SPACES.index(space)) << WINDOW)

    def run(p: Program, m: np.ndarray | None) -> None:
        address = np.asarray(p.get(args[1], TYPES["u64"]))
        p.put(args[0], (address - window if "to" in parts else address + window).astype(dtype), m)

    return run


@operation("membar", "fence")
def _fence(name: str, parts: list[str], args: list[str]) -> Run:
    if "proxy" in parts:  # whether wgmma sees what was written is not looked at beyond barriers
        if parts != ["proxy", "async", "shared"]:
            raise NotImplementedError(".".join([name, *parts]))
        return lambda p, m: None
    beyond_the_block = not {"cta"} & set(parts)
    return lambda p, m: p.fence(p.threads(m)) if beyond_the_block else None


@operation("nanosleep")
def _sleep(name: str, parts: list[str], args: list[str]) -> Run:
    return lambda p, m: None


@operation("trap")
def _trap(name: str, parts: list[str], args: list[str]) -> Run:
    def run(p: Program, m: np.ndarray | None) -> None:
        raise RuntimeError("the kernel gives up")

    return run


@operation("mov")
def _move(name: str, parts: list[str], args: list[str]) -> Run:
    kind = parts[-1]

    def run(p: Program, m: np.ndarray | None) -> None:
        if kind == "pred":
            p.put(args[0], p.predicate(args[1]), m)
        elif args[0].startswith("{"):
            into = _split(args[0])
            dtype = np.dtype(f"uint{8 * TYPES[kind].itemsize // len(into)}")
            wide = np.broadcast_to(p.get(args[1], TYPES[kind]), len(p.thread))
            halves = np.ascontiguousarray(wide).view(dtype).reshape(-1, len(into))
            for at, register in enumerate(into):
                p.put(register, halves[:, at], m)
        elif args[1].startswith("{"):
            origins = _split(args[1])
            dtype = np.dtype(f"uint{8 * TYPES[kind].itemsize // len(origins)}")
            halves = np.stack([np.broadcast_to(p.get(a, dtype), len(p.thread)) for a in origins], 1)
            p.put(args[0], np.ascontiguousarray(halves).view(TYPES[kind])[:, 0], m)
        else:
            p.put(args[0], p.get(args[1], TYPES[kind]), m)

    return run


def _addressing(operand: str) -> Callable[[Program, np.ndarray | None], np.ndarray]:
    """The addresses of those threads that take part."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    by = np.uint64(int(offset or "0", 0) % (1 << 64))

    def addresses(p: Program, m: np.ndarray | None) -> np.ndarray:
        found = p.get(base, TYPES["u64"]) + by
        if base[0] == "%" and p._kind(base) is np.uint32:  # shared and local memory, where sums wrap around
            found = found & np.uint64(0xFFFFFFFF)
        found = np.broadcast_to(found, len(p.thread))
        return found if m is None else found[m]

    return addresses


def _space(parts: Sequence[str]) -> str:
    return next((space for space in parts if space in SPACES), "global" if "const" in parts else "generic")


def _by_space(space: str, addresses: np.ndarray) -> Iterator[tuple[str, Any, np.ndarray]]:
    """(state space, which of the addresses are in it, those within it)."""
    if space != "generic":
        yield space, slice(None), addresses
        return
    windows = addresses >> np.uint64(WINDOW)
    for window in np.unique(windows):
        which = np.flatnonzero(windows == window)
        if window >= len(SPACES):
            raise MemoryFaultError(f"{int(addresses[which[0]]):#x} belongs to nobody")
        yield SPACES[window], which, addresses[which] - (window << np.uint64(WINDOW))


def _in_local(p: Program, addresses: np.ndarray, size: int, index: np.ndarray) -> np.ndarray:
    """Each thread's own, one behind the other."""
    if (addresses > p.code.local - size).any():
        raise MemoryFaultError(f"{p.local.where}: {size} bytes at {int(addresses.max()):#x} belong to nobody")
    return addresses + (index * p.code.local).astype(np.uint64)


def _read(p: Program, where: str, addresses: np.ndarray, size: int, threads: Threads, strong: bool) -> np.ndarray:
    """Bytes (n, size) in a state space, or in several ones by generic addresses."""
    found = np.empty((len(addresses), size), np.uint8)
    for space, which, at in _by_space(where, addresses):
        mine = threads._replace(index=threads.index[which])
        if space == "global":
            found[which] = load(p.memory, at, size, mine, strong)
        elif space == "shared":
            found[which] = load(p.shared, at, size, mine)
        elif space == "local":
            found[which] = load(p.local, _in_local(p, at, size, mine.index), size, None)
        else:
            found[which] = load(p.parameters, at, size, None)
    return found


def _write(p: Program, where: str, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
    for space, which, at in _by_space(where, addresses):
        mine = threads._replace(index=threads.index[which])
        if space == "global":
            store(p.memory, at, values[which], mine)
        elif space == "shared":
            store(p.shared, at, values[which], mine)
        elif space == "local":
            store(p.local, _in_local(p, at, values.shape[1], mine.index), values[which], None)
        else:
            raise MemoryFaultError(f"{p.parameters.where}: are not to be written")


STRONG = {"volatile", "relaxed", "acquire", "mmio"}


@operation("ld")
def _load(name: str, parts: list[str], args: list[str]) -> Run:
    dtype, into, space = TYPES[parts[-1]], _split(args[0]), _space(parts)
    addresses, strong = _addressing(args[1]), bool(STRONG & set(parts))
    size = len(into) * dtype.itemsize

    def run(p: Program, m: np.ndarray | None) -> None:
        if space == "param" and args[1][1] != "%":  # the same for all threads
            found = load(p.parameters, addresses(p, None)[:1], size, None)
        else:
            found = _read(p, space, addresses(p, m), size, p.threads(m), strong)
        values = np.ascontiguousarray(found).view(dtype)
        for at, register in enumerate(into):
            value = values[:, at]
            if m is not None and len(value) > 1:
                value = np.zeros(len(p.thread), dtype)
                value[m] = values[:, at]
            p.put(register, value, m)

    return run


def _threads_of_rows(p: Program, m: np.ndarray | None, parts: list[str], count: int) -> np.ndarray:
    """Which threads have the addresses of rows."""
    if m is not None or "m8n8" not in parts or parts[-1] != "b16":
        raise NotImplementedError(f"matrices of {'.'.join(parts)}, by {'some' if m is not None else 'all'} threads")
    return p.thread % WARP < 8 * count


@operation("ldmatrix")
def _load_matrices(name: str, parts: list[str], args: list[str]) -> Run:
    """8 x 8 matrices of 16 bits: lane 8 i + r has the address of row r of the i-th; lane 4 g + t gets entries 2 t and
    2 t + 1 of row g of each, or of column g (``trans``)."""
    into, addresses = _split(args[0]), _addressing(args[1])

    def run(p: Program, m: np.ndarray | None) -> None:
        asked = _threads_of_rows(p, m, parts, len(into))
        rows = load(p.shared, addresses(p, asked), 16, p.threads(asked)).view(np.uint16).reshape(-1, len(into), 8, 8)
        if "trans" in parts:
            rows = rows.swapaxes(2, 3)
        for at, register in enumerate(into):
            p.put(register, np.ascontiguousarray(rows[:, at]).view(np.uint32).reshape(-1), m)

    return run


@operation("stmatrix")
def _store_matrices(name: str, parts: list[str], args: list[str]) -> Run:
    """The same, the other way round."""
    origins, addresses = _split(args[1]), _addressing(args[0])

    def run(p: Program, m: np.ndarray | None) -> None:
        asked = _threads_of_rows(p, m, parts, len(origins))
        held = [np.broadcast_to(p.get(x, TYPES["b32"]), len(p.thread)) for x in origins]
        rows = np.stack([np.ascontiguousarray(x).view(np.uint16).reshape(-1, 8, 8) for x in held], 1)
        if "trans" in parts:
            rows = rows.swapaxes(2, 3)
        values = np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint8)
        store(p.shared, addresses(p, asked), values, p.threads(asked))

    return run


@operation("st")
def _store(name: str, parts: list[str], args: list[str]) -> Run:
    dtype, origins, space, addresses = TYPES[parts[-1]], _split(args[1]), _space(parts), _addressing(args[0])

    def run(p: Program, m: np.ndarray | None) -> None:
        values = np.stack([np.broadcast_to(p.get(a, dtype), len(p.thread)) for a in origins], 1)
        values = np.ascontiguousarray(values if m is None else values[m]).view(np.uint8)
        _write(p, space, addresses(p, m), values, p.threads(m))

    return run


ATOMICS: dict[str, Callable[..., Any]] = {  # of what is there and the operands
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
    "inc": lambda old, last: old.dtype.type(0) if old >= last else old + old.dtype.type(1),
    "dec": lambda old, last: last if old == 0 or old > last else old - old.dtype.type(1),
}


@operation("atom", "red")
def _atomic(name: str, parts: list[str], args: list[str]) -> Run:
    """In the order of threads. Sums of floating-point numbers are refused: on hardware they have no order."""
    dtype, space = TYPES[parts[-1]], _space(parts)
    function = next((ATOMICS[part] for part in parts if part in ATOMICS), None)
    into, target, *operands = args if name == "atom" else ["_", *args]
    if function is None or dtype.kind == "f" or len(_split(target)) > 1:
        raise NotImplementedError(".".join([name, *parts]))
    addresses, releases = _addressing(target), bool({"release", "acq_rel"} & set(parts))

    def run(p: Program, m: np.ndarray | None) -> None:
        old = np.zeros(len(p.thread), dtype)
        given = [np.broadcast_to(p.get(a, dtype), len(p.thread)) for a in operands]
        threads = p.threads(m)
        if releases:
            p.fence(threads)
        for thread, address in zip(threads.index, addresses(p, m), strict=True):
            ((where, _, at),) = _by_space(space, address[None])
            memory = p.memory if where == "global" else p.shared
            found = load(memory, at, dtype.itemsize, None).view(dtype)
            old[thread] = found[0, 0]
            new = function(found[0, 0], *(x[thread] for x in given))
            store(memory, at, np.array([[new]], dtype).view(np.uint8), None)
            if where == "global":
                p.release(threads._replace(index=np.array([thread])))
        p.put(into, old, m)

    return run


def _lanes(p: Program, m: np.ndarray | None, named: str) -> np.ndarray:
    """Who takes part in an exchange between lanes; they must be all those named who have not yet returned. (For a warp
    whose lanes have not all come it raises ``_NotTogether``, and is called again.)"""
    here = np.ones(len(p.thread), bool) if m is None else m
    members = np.broadcast_to(p.get(named, TYPES["u32"]), len(p.thread))
    if m is None and (members == EVERYONE).all():
        return here
    bit = np.uint32(1) << (p.thread % WARP).astype(np.uint32)
    for warp in np.unique(p.thread[here] // WARP):
        mine = p.thread // WARP == warp
        present, alive = (int(bit[mine & x].sum()) for x in (here, p.where >= 0))
        for expected in np.unique(members[mine & here]):
            if int(expected) & alive != present:
                who = f"{present:#010x} of the lanes of warp {warp} exchange values"
                told = f"{who}, and name {int(expected):#010x} of which {alive:#010x} are running"
                raise _NotTogether(mine & here, told)
    return here


@operation("shfl")
def _shuffle(name: str, parts: list[str], args: list[str]) -> Run:
    into, _, valid = args[0].partition("|")
    how, named = parts[1], args[4]

    def run(p: Program, m: np.ndarray | None) -> None:
        here, T = _lanes(p, m, named), len(p.thread)
        by, bounds = (np.broadcast_to(p.get(x, TYPES["u32"]), T).astype(np.int64) for x in args[2:4])
        lane, by, clamp, segment = p.thread % WARP, by & 31, bounds & 31, bounds >> 8 & 31
        lowest = lane & segment
        highest = lowest | clamp & ~segment
        source = {"bfly": lane ^ by, "idx": lowest | by & ~segment, "down": lane + by, "up": lane - by}[how]
        inside = source >= highest if how == "up" else source <= highest
        at = p.thread - lane + np.where(inside, source, lane)
        values = np.broadcast_to(p.get(args[1], TYPES["b32"]), T)
        there = here[np.minimum(at, T - 1)] & (at < T)
        p.put(into, np.where(there, values[np.minimum(at, T - 1)], EVERYONE), m)
        if valid:
            p.put(valid, inside, m)

    return run


@operation("vote")
def _vote(name: str, parts: list[str], args: list[str]) -> Run:
    how = parts[1]

    def run(p: Program, m: np.ndarray | None) -> None:
        here, T = _lanes(p, m, args[2]), len(p.thread)
        yes = np.broadcast_to(p.predicate(args[1]), T)
        bit = np.uint32(1) << (p.thread % WARP).astype(np.uint32)
        ballot = np.bincount(p.thread // WARP, np.where(here & yes, bit, 0)).astype(np.uint32)[p.thread // WARP]
        asked = np.bincount(p.thread // WARP, np.where(here, bit, 0)).astype(np.uint32)[p.thread // WARP]
        found = {"ballot": ballot, "any": ballot != 0, "all": ballot == asked, "uni": (ballot == asked) | (ballot == 0)}
        p.put(args[0], found[how], m)

    return run


@operation("redux")
def _reduce(name: str, parts: list[str], args: list[str]) -> Run:
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    function, dtype = functions[parts[1]], TYPES[parts[-1]]

    def run(p: Program, m: np.ndarray | None) -> None:
        here = _lanes(p, m, args[2])
        values, out = np.broadcast_to(p.get(args[1], dtype), len(p.thread)), np.zeros(len(p.thread), dtype)
        for warp in np.unique(p.thread[here] // WARP):
            mine = (p.thread // WARP == warp) & here
            out[mine] = function.reduce(values[mine], dtype=dtype)
        p.put(args[0], out, m)

    return run


def cut(terms: np.ndarray, C: np.ndarray) -> np.ndarray:
    """C (...) + Σ terms (..., n), in float32 as tensor cores add: all are aligned to the largest of them, two bits
    below its last are kept, and their sum is cut, not rounded. (Measured on an H200, see docs/gpu-notes.md.)"""
    every = np.concatenate([terms, C[..., None]], -1)
    with np.errstate(all="ignore"):
        largest = np.abs(every).max(-1, keepdims=True)
        quantum = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1))) - 25)
        total = (np.trunc(every / quantum) * quantum).sum(-1)
        rounded = total.astype(np.float32)
        beyond = np.abs(rounded.astype(np.float64)) > np.abs(total)
        rounded = np.where(beyond, np.nextafter(rounded, np.float32(0)), rounded)
        return np.where(np.isfinite(largest[..., 0]), rounded, every.sum(-1)).astype(np.float32)


def product_of_halves(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    """A (..., M, K) B (..., K, N) + C of fp16 and float32, 16 columns of A at a time."""
    for at in range(0, A.shape[-1], 16):
        a, b = A[..., at : at + 16].astype(np.float64), B[..., at : at + 16, :].astype(np.float64)
        C = cut(a[..., :, None, :] * b.swapaxes(-1, -2)[..., None, :, :], C.astype(np.float64))
    return C


def product_of_tf32(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    """The same of float32, of which the upper 19 bits count, 8 columns of A at a time."""
    a, b = ((x.view(np.uint32) & TF32).view(np.float32).astype(np.float64) for x in map(np.ascontiguousarray, (A, B)))
    return cut(a[..., :, None, :] * b.swapaxes(-1, -2)[..., None, :, :], C.astype(np.float64))


@operation("mma")
def _matrix(name: str, parts: list[str], args: list[str]) -> Run:
    """D = A B + C. Lane 4 g + t of a warp has A's rows g (and g + 8) and B's column g at columns and rows t, t + 4, ...
    (float64) or 2 t, 2 t + 1, 2 t + 8, 2 t + 9 (fp16), and of C and D entries 2 t and 2 t + 1 of those rows."""
    shape = re.fullmatch(r"m(8|16)n8k(4|8|16)", parts[2])
    halves = parts[2:] == ["m16n8k16", "row", "col", "f32", "f16", "f16", "f32"]
    if not halves and (not shape or parts[-1] != "f64"):
        raise NotImplementedError(".".join([name, *parts]))
    M, K = int(shape[1]), int(shape[2])

    def held(p: Program, operand: str, dtype: str) -> np.ndarray:
        registers = [np.broadcast_to(p.get(x, TYPES[dtype]), len(p.thread)) for x in _split(operand)]
        return np.stack(registers, 1)

    def packed(p: Program, operand: str) -> np.ndarray:
        """(warp, g, t, register, 2) of fp16."""
        x = np.ascontiguousarray(held(p, operand, "b32")).view(np.float16)
        return x.reshape(-1, 8, 4, x.shape[1] // 2, 2)

    def run(p: Program, m: np.ndarray | None) -> None:
        _lanes(p, m, "0xffffffff")

        def matrices(operand: str, order: Sequence[int], *sizes: int) -> np.ndarray:
            """Registers (warp, ..., row or column g, t), the dots in the order of the registers."""
            found = held(p, operand, "f32" if halves else "f64").reshape(-1, 8, 4, *sizes)
            return found.transpose(0, *(at + 1 for at in order))

        C = matrices(args[3], (2, 0, 1, 3), M // 8, 2).reshape(-1, M, 8)
        if halves:
            a = packed(p, args[1]).reshape(-1, 8, 4, 2, 2, 2)  # warp, g, t, block of columns, half of rows, entry
            A = a.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
            B = packed(p, args[2]).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
            D = product_of_halves(A, B, C)
        else:
            A = matrices(args[1], (3, 0, 2, 1), K // 4, M // 8).reshape(-1, M, K)  # g, t, block of columns, half
            B = matrices(args[2], (2, 1, 0), K // 4).reshape(-1, K, 8)
            D = C + A @ B
        D = D.reshape(-1, M // 8, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(len(p.thread), -1)
        for at, register in enumerate(_split(args[0])):
            p.put(register, D[:, at], m)

    return run


SWIZZLES = {1: 128, 2: 64, 3: 32}  # by a descriptor's number: bytes of a row


def _chunks(descriptors: np.ndarray, rows: int, across: bool) -> np.ndarray:
    """Addresses (warpgroup, chunk) of what a descriptor is of: ``rows`` rows of 16 columns, or with ``across`` 16 of so
    many columns, by chunks of 8 numbers, row by row.

    Bits 0 to 13 are the address, 16 to 29 and 32 to 45 the distances to the next chunks across and to the next eight
    rows, all over 16; the topmost two say how the chunks of eight rows are permuted.
    """
    address, far, eight = ((descriptors >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    (swizzle,) = set((descriptors >> 62 & 3).tolist())
    pitch = SWIZZLES.get(swizzle)
    if pitch is None:
        raise NotImplementedError("wgmma of a matrix that is not swizzled")
    row, chunk = np.divmod(np.arange(2 * rows), rows // 8 if across else 2)
    at = (row % 8) * pitch + 16 * (chunk % (pitch // 16) if across else chunk)
    places = address[:, None] + at + (row // 8) * eight[:, None]
    if across:
        places = places + chunk // (pitch // 16) * far[:, None]
    return places ^ (places >> 7 & pitch // 16 - 1) << 4


@operation("wgmma")
def _group_product(name: str, parts: list[str], args: list[str]) -> Run:
    """D = A B + D of four warps, M = 64, of fp16 (K = 16) in shared memory by descriptors, or A in registers; or of
    TF32 (K = 8), A in registers. Warp w has rows 16 w to 16 w + 15, its lanes as ``mma`` has them. Until its group was
    waited for accumulators are NaN, and operands in shared memory unread: what overwrites them sooner shows."""
    if parts[0] == "fence":
        return lambda p, m: None
    if parts[0] == "commit_group":

        def commit(p: Program, m: np.ndarray | None) -> None:
            p.products_committed += 1

        return commit
    if parts[0] == "wait_group":

        def wait(p: Program, m: np.ndarray | None) -> None:
            while p.products and p.products[0].group < p.products_committed - int(args[0]):
                one = p.products.pop(0)
                found = one.compute(one.before)
                for at, later in enumerate(p.products):
                    if later.into == one.into:
                        p.products[at] = later._replace(before=found)
                        break
                else:
                    for at, register in enumerate(one.into):
                        p.put(register, found[:, at], None)

        return wait
    shape = re.fullmatch(r"m64n(\d+)k(8|16)", parts[3])
    halves = parts[4:] == ["f32", "f16", "f16"]
    if (
        not shape
        or parts[:3] != ["mma_async", "sync", "aligned"]
        or (int(shape[2]), parts[4:]) not in ((16, ["f32", "f16", "f16"]), (8, ["f32", "tf32", "tf32"]))
    ):
        raise NotImplementedError(".".join([name, *parts]))
    in_registers = args[1].startswith("{")
    known = args[4:6] == ["1", "1"] and (in_registers or (halves and args[6] == "0"))
    if not known:
        raise NotImplementedError(f"{'.'.join([name, *parts])} {args[1:]}")
    N, into, across = int(shape[1]), tuple(_split(args[0])), halves and args[6 if in_registers else 7] == "1"
    element = np.float16 if halves else np.float32

    def descriptors(p: Program, operand: str) -> np.ndarray:
        found: np.ndarray = p.get(operand, TYPES["u64"]).astype(np.int64).reshape(-1, 128)
        if (found != found[:, :1]).any():
            raise RaceError(f"{p.code.name}: the lanes of {name} have different descriptors")
        return found[:, 0]

    def run(p: Program, m: np.ndarray | None) -> None:
        if m is not None or len(p.thread) % 128:
            raise NotImplementedError(f"{name} by some threads")
        adds = np.broadcast_to(p.predicate(args[3]), len(p.thread))

        def matrix(addresses: np.ndarray, transposed: bool) -> np.ndarray:
            """(warpgroup, rows, K), or (warpgroup, K, rows)."""
            groups, count = addresses.shape
            who = (np.arange(groups)[:, None] * 128 + np.arange(count) % 128).ravel()
            read = load(p.shared, addresses.ravel(), 16, Threads(p.at, who, p.barriers, p.of_warp))
            x = np.ascontiguousarray(read).view(element)
            return x.reshape(groups, int(shape[2]), -1) if transposed else x.reshape(groups, -1, int(shape[2]))

        of_b = _chunks(descriptors(p, args[2]), N, across)
        if in_registers:  # group, warp, g, t, block of columns, half of rows, entry
            kind = TYPES["u32" if halves else "f32"]
            lanes = np.stack([np.broadcast_to(p.get(x, kind), len(p.thread)) for x in _split(args[1])], 1)
            entries = np.ascontiguousarray(lanes).view(element).reshape(-1, 4, 8, 4, 2, 2, 2 if halves else 1)
            in_lanes = entries.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, 64, int(shape[2]))
        else:
            of_a = _chunks(descriptors(p, args[1]), 64, False)

        def compute(before: np.ndarray) -> np.ndarray:
            A, B = in_lanes if in_registers else matrix(of_a, False), matrix(of_b, across)
            C = before.reshape(-1, 4, 8, 4, N // 8, 2, 2)  # group, warp, g, t, block, half, entry
            C = C.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, 64, N)
            D = (product_of_halves if halves else product_of_tf32)(A, B if across else B.swapaxes(1, 2), C)
            return D.reshape(-1, 4, 2, 8, N // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(len(p.thread), -1)

        held = np.stack([np.broadcast_to(p.get(x, TYPES["f32"]), len(p.thread)) for x in into], 1)
        p.products.append(Product(p.products_committed, into, np.where(adds[:, None], held, 0), compute))
        for register in into:
            p.put(register, np.float32(np.nan), None)

    return run


@operation("cp")
def _copy(name: str, parts: list[str], args: list[str]) -> Run:
    """cp.async: what was in its place is NaN from now on, until its thread has waited for its group."""
    if "commit_group" in parts:

        def commit(p: Program, m: np.ndarray | None) -> None:
            p.groups[slice(None) if m is None else m] += 1

        return commit
    if {"wait_group", "wait_all"} & set(parts):

        def wait(p: Program, m: np.ndarray | None) -> None:
            left = int(args[0], 0) if "wait_group" in parts else -1
            some = np.ones(len(p.thread), bool) if m is None else m
            kept = []
            for threads, groups, addresses, copied in p.copies:
                done = some[threads] & (groups < p.groups[threads] - left)
                if done.any():
                    waiting = Threads(p.at, threads[done], p.barriers, p.of_warp)
                    store(p.shared, addresses[done], copied[done], waiting)
                if not done.all():
                    kept.append((threads[~done], groups[~done], addresses[~done], copied[~done]))
            p.copies = kept

        return wait
    if "bulk" in parts or "shared" not in parts:
        raise NotImplementedError(".".join([name, *parts]))
    into, origin = _addressing(args[0]), _addressing(args[1])

    def run(p: Program, m: np.ndarray | None) -> None:
        size = int(args[2], 0)
        given = np.full(len(p.thread), size)
        if len(args) == 4:
            given = np.broadcast_to(p.get(args[3], TYPES["u32"]), len(p.thread))
        given = given if m is None else given[m]
        out = np.zeros((len(given), size), np.uint8)
        index = p.thread if m is None else p.thread[m]
        some = given > 0
        if (given[some] != size).any():
            raise NotImplementedError(f"cp.async of a part: {args}")
        reading = Threads(p.at, index[some], p.barriers, p.of_warp)
        out[some] = load(p.memory, origin(p, m)[some], size, reading)
        addresses = into(p, m)
        store(p.shared, addresses, np.full_like(out, 0xFF), p.threads(m))
        p.copies.append((index, p.groups[index], addresses, out))

    return run


# ------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------


def live_memory(where: str, more: Sequence[Region] = ()) -> Memory:
    """Whatever belongs to a tensor of this process, and more."""
    regions, kinds = {}, {torch.Tensor, torch.nn.Parameter}
    for x in [x for x in gc.get_objects() if type(x) in kinds]:
        if x.device.type == "cpu" and x.layout == torch.strided:
            try:
                storage = x.untyped_storage()
                start = storage.data_ptr() if storage.nbytes() else 0
            except (RuntimeError, NotImplementedError):  # fake tensors, and what compiling left behind
                continue
            if start:
                regions[start] = storage
    found = {start: Region(start, _bytes_of(storage)) for start, storage in regions.items()}
    found |= {region.start: region for region in more}
    return Memory(list(found.values()), f"{where}, global memory")


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def flattened(arguments: Sequence[Any]) -> Iterator[Any]:
    for value in arguments:
        if isinstance(value, tuple):
            yield from flattened(value)
        elif value is not None:
            yield value


def _passed(value: Any, size: int) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, float):
        return np.array(value, f"float{8 * size}").tobytes()
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


def execute(
    ptx: str,
    shared: int,
    programs: int,
    arguments: Sequence[Any],
    name: str | None = None,
    threads: int | None = None,
    owned: Sequence[tuple[int, int]] = (),
) -> None:
    """A launch of a kernel, of the one named where a module has several.

    Arguments as they are passed: tensors, integers, floats, and bytes for structs; tuples flattened, None left out.
    Threads of a program are as many as the code says, or as given, where it has a maximum or says nothing. ``shared``
    is bytes beyond those that the code declares; owned, (address, bytes), is memory that no tensor of Python's has."""
    code = parse(ptx, name)
    T, most = code.threads if threads is None else threads, code.threads
    if T is None or (most is not None and (most != T if code.exactly else most < T)):
        raise ValueError(f"threads: {code.name} has {'' if code.exactly else 'up to '}{most}, not {T}")
    given, sizes = list(flattened(arguments)), list(code.parameters.values())
    own = sizes[len(given) :]
    if len(given) > len(sizes) or len(own) > 2 or set(own) - {8}:
        raise ValueError(f"arguments: {code.name} has {len(sizes)}, not {len(given)}")
    passed = [_passed(x, size) for x, size in zip(given, sizes, strict=False)]
    passed += [bytes(8)] * len(own)  # Triton's own, for scratch memory
    for (parameter, size), value in zip(code.parameters.items(), passed, strict=True):
        if len(value) != size:
            raise ValueError(f"{parameter}: {len(value)} bytes, not {size}")
    parameters = np.frombuffer(b"".join(value + bytes(-len(value) % 16) for value in passed) + bytes(16), np.uint8)
    more = [Region(data.ctypes.data, data) for data in code.variables]
    more += [Region(at, np.frombuffer((ctypes.c_uint8 * n).from_address(at), np.uint8)) for at, n in owned if n]
    memory = live_memory(code.name, more)
    with np.errstate(all="ignore"):
        for at in range(programs):
            Program(code, parameters, memory, shared, T, at, programs).run()


def install() -> None:
    """The Triton backend takes tensors on the CPU, compiles for sm_90, and launches here."""
    torch.version.cuda = torch.version.cuda or "none"  # asked for when the package is imported
    from triton.backends.compiler import GPUTarget

    from pmrl_kernels import ops
    from pmrl_kernels.ops.triton import runtime

    target, binaries = GPUTarget("cuda", 90, 32), {}

    def here(one: runtime.Launch) -> None:
        key = (one.kernel, one.compilation())
        if key not in binaries:
            binaries[key] = runtime.compile_for(target, *key)
        execute(binaries[key].asm["ptx"], binaries[key].metadata.shared, one.programs, one.arguments)

    folder = os.environ.get("TRITON_LIBCUDA_PATH")
    runtime.run = here if folder is None else _through_the_launcher(folder)

    def here_as_on_a_gpu(own: Callable[..., str | None]) -> Callable[..., str | None]:
        def rejects(device: torch.device, *arguments: Any) -> str | None:
            return own(torch.device("cuda"), *arguments) if device.type == "cpu" else f"no {device.type} here"

        return rejects

    backend = ops.available["triton"]
    pairs = {name: pair._replace(rejects=here_as_on_a_gpu(pair.rejects)) for name, pair in backend.pairs.items()}
    ops.available["triton"] = backend._replace(rejects=here_as_on_a_gpu(backend.rejects), pairs=pairs)
    # Where somebody looks on, a negated view say, the operators are called, which are for GPUs; joint scores always.
    from pmrl_kernels.ops.contrast import triton as contrasts
    from pmrl_kernels.ops.joint import reference as joint_reference
    from pmrl_kernels.ops.joint import spec as joint_spec
    from pmrl_kernels.ops.joint import triton as joint
    from pmrl_kernels.ops.spectral import triton as spectral

    scores = joint.PAIRS[joint_spec.JOINT.name]
    for operator, function in (
        *((kernels.forward_operator, kernels._forward) for kernels in (spectral, contrasts)),
        *((kernels.backward_operator, kernels._backward) for kernels in (spectral, contrasts)),
        (scores.forward, joint._forward),
        (scores.backward, joint_reference.backward),
    ):
        library = torch.library.Library(operator.namespace, "FRAGMENT")
        library.impl(operator._schema.name.partition("::")[2], function, "CPU")
        _libraries.append(library)  # whose end would be that of what it has registered


_libraries: list[torch.library.Library] = []


class _Grid(ctypes.Structure):
    """The first fields of CUlaunchConfig."""

    _fields_ = (*((name, ctypes.c_uint) for name in [*"XYZxyz", "shared"]), ("stream", ctypes.c_void_p))


_Launched = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.POINTER(_Grid), ctypes.POINTER(ctypes.c_void_p))
_STREAM = 0x57EA


def _through_the_launcher(folder: str) -> Callable[..., None]:
    """The backend's own way to launch, on an sm_90 that is libcuda.c."""
    libcuda = ctypes.CDLL(os.path.join(folder, "libcuda.so.1"), ctypes.RTLD_GLOBAL)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda index: _STREAM
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from pmrl_kernels.ops.triton import runtime

    triton.runtime.driver.set_active(CudaDriver())
    own, errors = runtime.run, []

    def run(function: int, grid: Any, arguments: Any) -> None:
        (binary,) = (binary for binary in runtime._compiled.values() if binary.function == function)
        ptx, at = binary.asm["ptx"], grid.contents
        code = parse(ptx)
        shape = (at.Y, at.Z, at.x, at.y, at.z, at.shared, at.stream)
        if shape != (1, 1, code.threads, 1, 1, binary.metadata.shared, _STREAM):
            raise ValueError(f"{code.name}: launched with {shape}")
        sizes = code.parameters.values()
        values = [int.from_bytes(ctypes.string_at(arguments[i], size), "little") for i, size in enumerate(sizes)]
        execute(ptx, at.shared, at.X, values)

    @_Launched
    def launched(*launch: Any) -> None:
        try:
            run(*launch)
        except Exception as error:  # which C would not pass on
            errors.append(error)

    libcuda.on_launch(launched)

    def through_triton(one: runtime.Launch, kept: Any = launched) -> None:  # C does not keep it alive
        own(one)
        if errors:
            raise errors.pop()

    return through_triton


def pytest_load_initial_conftests() -> None:
    """Before conftest.py asks which backends there are."""
    install()
