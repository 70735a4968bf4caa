"""Compiled Triton kernels on a CPU: an interpreter of PTX that watches memory.

    python -m pytest -p tests.tools.ptx tests/contract -k triton --one-in 60

Triton's own interpreter runs the source; this runs what the compiler made of it for sm_90: fused multiply-adds,
layouts, shuffles, predicated loads and stores, barriers. As a pytest plugin it has the Triton backend take tensors of a
CPU and runs each of its launches, one program after the other, its threads in step. With ``TRITON_LIBCUDA_PATH`` at a
folder with a driver compiled from libcuda.c, kernels are launched by Triton itself, through its launcher in C, and run
here with what would go to the card; else they are called with the arguments that it would be given. It raises

* ``MemoryFaultError`` where a thread accesses what belongs to no tensor, or is not aligned;
* ``RaceError`` where two threads access the same byte, one of them changing it, with no barrier in between that both
  pass: shared and global memory, threads of one warp included, and other programs of the same launch. (The racecheck of
  compute-sanitizer looks at shared memory only.) Reads marked volatile are left out: an atomic counter orders these.

What it does not show: time, approximate functions as the hardware has them (they are exact here), and orders of
execution other than in step. A fused multiply-add is rounded twice, the first time to 64 bits (float32: 53).

Compilers leave registers undefined where a value goes unused (the half beyond k of a packed pair, say). These hold
ones in all bits here, which is NaN in every floating-point type, so a result that depends on one shows.
"""

from __future__ import annotations

import bisect
import ctypes
import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
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


class MemoryFaultError(Exception):
    pass


class RaceError(Exception):
    pass


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


def load(memory: Memory, addresses: np.ndarray, size: int, threads: Threads | None) -> np.ndarray:
    """Bytes (n, size). Without threads nobody watches."""
    out = np.empty((len(addresses), size), np.uint8)
    for region, who, offsets in memory.find(addresses, size):
        at = offsets[:, None] + np.arange(size)
        out[who] = region.data[at]
        if threads is None:
            continue
        region.watch()
        now = np.broadcast_to(_stamps(threads, who)[:, None], (*at.shape, 4))
        racing = _unordered(region.writes[at], now)
        if racing.any():
            raise RaceError(_told(memory, "reads", now[racing][0], "what", region.writes[at][racing][0], "wrote"))
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
                    raise RaceError(_told(memory, "writes", now[racing][0], "where", past[racing][0], what))
            order = np.argsort(at.ravel(), kind="stable")
            flat, bytes_ = at.ravel()[order], values[who].ravel()[order]
            twice = (flat[1:] == flat[:-1]) & (bytes_[1:] != bytes_[:-1])
            if twice.any():
                raise RaceError(f"{memory.where}: two threads write different bytes to one address at once")
            region.writes[at[changed]] = now[changed]
        region.data[at] = values[who]


def _told(memory: Memory, verb: str, now: np.ndarray, link: str, past: np.ndarray, did: str) -> str:
    def name(stamp: np.ndarray) -> str:
        return f"thread {stamp[1]} of program {stamp[0]}" if stamp[1] >= 0 else f"several threads of program {stamp[0]}"

    return f"{memory.where}: {name(now)} {verb} {link} {name(past)} {did}, with no barrier in between"


# ------------------------------------------------------------------------------------------------
# Code
# ------------------------------------------------------------------------------------------------

Run = Callable[["Program", "np.ndarray | None"], Any]


class Instruction(NamedTuple):
    text: str
    line: str  # of the source
    name: str  # the part of the opcode before the first dot
    predicate: str | None
    wanted: bool
    run: Run | None  # None for what changes the flow
    target: str | None  # of a branch


class Code(NamedTuple):
    name: str
    parameters: dict[str, int]  # their bytes
    registers: dict[str, Any]  # prefix -> dtype
    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int


def parse(text: str) -> Code:
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)", text, re.DOTALL)
    body = text[text.index("{", entry.end()) :]
    # .param .u64 [.ptr .global .align 1] name
    parameters = {
        words[-1]: TYPES[words[1].lstrip(".")].itemsize for words in (part.split() for part in entry[2].split(","))
    }
    threads = int(re.search(r"\.reqntid\s+(\d+)", text)[1])
    registers = {}
    for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<", body):
        registers[prefix] = RAW["pred" if kind == "pred" else kind.lstrip("bfsu")]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    files = {
        m[1]: m[2].rpartition("/")[2] for m in re.finditer(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", text, re.MULTILINE)
    }
    line = ""
    body = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)[^\n]*$", r"@line \1 \2;", body, flags=re.MULTILINE)
    body = re.sub(r"^\s*\.(file|reg|pragma|section)\b[^\n]*$", "", body, flags=re.MULTILINE)
    body = body[1 : body.index("$L__func_end0")]
    # a register of one statement, which is not read
    body = re.sub(r"\btmp\b", "_", re.sub(r"\{\s*\.reg\s+\.\w+\s+tmp;", "", body))
    for statement in re.split(r";|(?<=:)\s*\n", body):
        statement = " ".join(statement.split()).lstrip("{} ")
        while label := re.match(r"(\$\w+):\s*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if statement.startswith("@line"):
            _, file, number = statement.split()
            line = f"{files.get(file)}:{number}"
        elif statement:
            instructions.append(_decoded(statement, line))
    return Code(entry[1], parameters, registers, instructions, labels, threads)


def _decoded(statement: str, line: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if not found:
        raise NotImplementedError(statement)
    negated, predicate, opcode, rest = found.groups()
    arguments = [a.strip() for a in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
    name, *parts = opcode.replace("::cta", "").split(".")  # this block's shared memory: there is no other one here
    if name in ("bra", "ret") or opcode in ("bar.sync", "bar.warp.sync"):
        target = arguments[0] if name == "bra" else None
        name = "warp" if opcode == "bar.warp.sync" else name
        return Instruction(statement, line, name, predicate, not negated, None, target)
    if name not in OPERATIONS:
        raise NotImplementedError(statement)
    return Instruction(statement, line, name, predicate, not negated, OPERATIONS[name](parts, arguments), None)


# ------------------------------------------------------------------------------------------------
# Running a program
# ------------------------------------------------------------------------------------------------


class Program:
    """The state of one program (thread block) of a launch."""

    def __init__(self, code: Code, parameters: dict[str, int], memory: Memory, shared: int, at: int, of: int) -> None:
        T = code.threads
        self.code, self.parameters, self.memory = code, parameters, memory
        self.shared = Memory([Region(0, np.full(max(shared, 16), 0xFF, np.uint8))], f"{code.name}, shared memory")
        self.registers: dict[str, np.ndarray] = {}
        self.special = {"%tid.x": np.arange(T), "%ctaid.x": at, "%ntid.x": T, "%nctaid.x": of}
        self.special |= {"%laneid": np.arange(T) % WARP}
        self.thread, self.barriers, self.of_warp = np.arange(T), 0, np.zeros(T // WARP, np.int32)
        self.at = at

    def _register(self, operand: str) -> np.ndarray:
        """The bits in a declared register; ones as long as nobody has written to it."""
        if operand not in self.registers:
            kind = self.code.registers[operand.rstrip("0123456789")]
            self.registers[operand] = ~np.zeros(len(self.thread), kind)
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
        if operand[:2] in ("0d", "0f"):
            bits = np.uint64(int(operand[2:], 16)) if operand[1] == "d" else np.uint32(int(operand[2:], 16))
            return bits.view(dtype)
        if operand == "global_smem":
            return dtype.type(0)
        value = int(operand.rstrip("U"), 0)
        if dtype.kind == "f":
            return np.array(value & ((1 << 8 * dtype.itemsize) - 1), f"uint{8 * dtype.itemsize}").view(dtype)
        bits = 8 * dtype.itemsize
        return np.array(value & ((1 << bits) - 1), f"uint{bits}").view(dtype)[()]

    def predicate(self, operand: str) -> Any:
        if operand[0] == "!":
            return ~self._register(operand[1:])
        if operand[0] == "%":
            return self._register(operand)
        return bool(int(operand, 0) & 1)

    def put(self, operand: str, value: Any, active: np.ndarray | None) -> None:
        if operand == "_":
            return
        kind = self.code.registers[operand.rstrip("0123456789")]
        T = len(self.thread)
        if kind is np.bool_:
            raw = np.broadcast_to(np.asarray(value, np.bool_), T)
        else:
            value = np.asarray(value)
            width = np.dtype(kind).itemsize
            if value.dtype.itemsize != width:
                if value.dtype.kind == "f":
                    value = value.view(f"uint{8 * value.dtype.itemsize}")
                value = value.astype(f"{'int' if value.dtype.kind == 'i' else 'uint'}{8 * width}")
            raw = np.broadcast_to(np.ascontiguousarray(value).view(kind).reshape(np.shape(value)), T)
        if active is None:
            self.registers[operand] = np.array(raw)
            return
        self.registers[operand] = np.where(active, raw, self._register(operand))

    def threads(self, active: np.ndarray | None) -> Threads:
        index = self.thread if active is None else self.thread[active]
        return Threads(self.at, index, self.barriers, self.of_warp)

    def run(self) -> None:
        """All threads in step as long as they agree; else whoever is furthest behind goes first."""
        T = len(self.thread)
        code, labels = self.code.instructions, self.code.labels
        where = np.zeros(T, np.int64)  # -1: done
        waiting = np.full(T, "", "U4")
        while True:
            ready = (where >= 0) & (waiting == "")
            if not ready.any():
                if not (where >= 0).any():
                    return
                self._release(where, waiting)
                continue
            pc = int(where[ready].min())
            active = ready & (where == pc)
            instruction = code[pc]
            everyone = bool(active.all())
            chosen = active
            if instruction.predicate is not None:
                chosen = active & (self.registers[instruction.predicate] == instruction.wanted)
            if instruction.run is not None:
                if chosen.any():
                    try:
                        instruction.run(self, None if everyone and chosen.all() else chosen)
                    except Exception as error:
                        where_it_is = f"{self.code.name}, program {self.at}, {instruction.line}: {instruction.text}"
                        raise type(error)(f"{error}\n{where_it_is}") from error
                where[active] = pc + 1
            elif instruction.name == "bra":
                where[active] = pc + 1
                where[chosen] = labels[instruction.target]
            elif instruction.name == "ret":
                where[active] = pc + 1
                where[chosen] = -1
            else:
                where[active] = pc + 1
                waiting[chosen] = instruction.name

    def _release(self, where: np.ndarray, waiting: np.ndarray) -> None:
        alive = where >= 0
        if (waiting[alive] == "bar").all():
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


def operation(*names: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        for name in names:
            OPERATIONS[name] = lambda parts, args, name=name: make(name, parts, args)
        return make

    return register


def _split(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _fma(a: Any, b: Any, c: Any) -> Any:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32)
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


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
}


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
    if name == "div" and dtype.kind != "f":
        raise NotImplementedError(".".join([name, *parts]))
    if "NaN" in parts:
        function = {"min": np.minimum, "max": np.maximum}[name]

    def run(p: Program, m: np.ndarray | None) -> None:
        values = [np.asarray(p.get(a, dtype)) for a in args[1:]]
        if flush:
            values = [_flushed(v) for v in values]
        found = np.asarray(function(*values), dtype)
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
    if "hi" in parts:
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        a, b = (np.asarray(p.get(x, dtype)).astype(wide) for x in args[1:3])
        found = a * b
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

    def run(p: Program, m: np.ndarray | None) -> None:
        a = np.asarray(p.get(args[1], dtype))
        start, length = (int(p.get(x, TYPES["u32"])) for x in args[2:4])
        top = dtype.type(8 * dtype.itemsize - start - length)
        p.put(args[0], ((a << top) >> dtype.type(top + dtype.type(start))).astype(dtype), m)

    return run


@operation("popc")
def _population(name: str, parts: list[str], args: list[str]) -> Run:
    def run(p: Program, m: np.ndarray | None) -> None:
        a = np.asarray(p.get(args[1], TYPES[parts[-1]]))
        p.put(args[0], sum(((a >> a.dtype.type(bit)) & 1).astype(np.uint32) for bit in range(8 * a.dtype.itemsize)), m)

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
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


ROUNDING = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}


@operation("cvt")
def _convert(name: str, parts: list[str], args: list[str]) -> Run:
    to, origin = parts[-2:]
    rounding = next((ROUNDING[part] for part in parts if part in ROUNDING), None)
    if "sat" in parts:
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        if to in ("bf16x2", "f16x2"):
            halves = [np.asarray(p.get(a, TYPES["f32"])) for a in args[1:]]
            half = _to_bfloat16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            high, low = (half(x).astype(np.uint32) for x in halves)
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
        p.put(args[0], x.astype(dtype), m)
        return None

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


def _address(operand: str) -> tuple[str, int]:
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    return base, int(offset or "0", 0)


def _addresses(p: Program, operand: str, m: np.ndarray | None) -> np.ndarray:
    base, offset = _address(operand)
    found = np.broadcast_to(np.asarray(p.get(base, TYPES["u64"])), len(p.thread)) + np.uint64(offset % (1 << 64))
    return found if m is None else found[m]


@operation("ld")
def _load(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    if "param" in parts:
        parameter = args[1].strip("[] ")
        raw = np.dtype(f"uint{8 * dtype.itemsize}")
        return lambda p, m: p.put(args[0], np.array(p.parameters[parameter], np.uint64).astype(raw).view(dtype), m)
    into = _split(args[0])

    def run(p: Program, m: np.ndarray | None) -> None:
        memory = p.shared if "shared" in parts else p.memory
        watching = None if "volatile" in parts else p.threads(m)
        found = load(memory, _addresses(p, args[1], m), len(into) * dtype.itemsize, watching)
        values = np.ascontiguousarray(found).view(dtype)
        for at, register in enumerate(into):
            value = values[:, at]
            if m is not None:
                value = np.zeros(len(p.thread), dtype)
                value[m] = values[:, at]
            p.put(register, value, m)

    return run


@operation("ldmatrix")
def _load_matrices(name: str, parts: list[str], args: list[str]) -> Run:
    """8 x 8 matrices of 16 bits: lane 8 i + r has the address of row r of the i-th, and gets two entries of each."""
    into = _split(args[0])
    if "trans" in parts or "m8n8" not in parts:
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        if m is not None:
            raise NotImplementedError(f"{name} by some threads")
        asked = p.thread % WARP < 8 * len(into)
        rows = load(p.shared, _addresses(p, args[1], asked), 16, p.threads(asked)).reshape(-1, len(into), 8, 4, 4)
        for at, register in enumerate(into):
            p.put(register, np.ascontiguousarray(rows[:, at].reshape(-1, 4)).view(np.uint32)[:, 0], m)

    return run


@operation("st")
def _store(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    origins = _split(args[1])

    def run(p: Program, m: np.ndarray | None) -> None:
        memory = p.shared if "shared" in parts else p.memory
        values = np.stack([np.broadcast_to(p.get(a, dtype), len(p.thread)) for a in origins], 1)
        values = np.ascontiguousarray(values if m is None else values[m]).view(np.uint8)
        store(memory, _addresses(p, args[0], m), values, p.threads(m))

    return run


@operation("atom")
def _atomic(name: str, parts: list[str], args: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    if "add" not in parts or dtype.kind == "f":
        raise NotImplementedError(".".join([name, *parts]))

    def run(p: Program, m: np.ndarray | None) -> None:
        addresses, old = _addresses(p, args[1], m), np.zeros(len(p.thread), dtype)
        added = np.broadcast_to(p.get(args[2], dtype), len(p.thread))
        for thread, address in zip(p.thread if m is None else p.thread[m], addresses, strict=True):
            found = load(p.memory, address[None], dtype.itemsize, None).view(dtype)
            old[thread] = found[0, 0]
            store(p.memory, address[None], (found + added[thread]).astype(dtype).view(np.uint8), None)
        p.put(args[0], old, m)

    return run


def _whole_warps(p: Program, m: np.ndarray | None, what: str) -> None:
    if m is not None and len(np.unique(np.bincount(p.thread[m] // WARP, minlength=1))) > 2:
        raise NotImplementedError(f"{what} by a part of a warp")


@operation("shfl")
def _shuffle(name: str, parts: list[str], args: list[str]) -> Run:
    if args[3] != "31" or "|" in args[0]:
        raise NotImplementedError(f"{name} {args}")

    def run(p: Program, m: np.ndarray | None) -> None:
        _whole_warps(p, m, name)
        by = np.broadcast_to(p.get(args[2], TYPES["u32"]), len(p.thread)).astype(np.int64)
        lane = p.thread % WARP
        source = {"bfly": lane ^ by, "idx": by % WARP, "down": lane + by, "up": lane - by}[parts[1]]
        source = np.where((source >= 0) & (source < WARP), source, lane)
        values = np.broadcast_to(p.get(args[1], TYPES["b32"]), len(p.thread))
        p.put(args[0], values[p.thread - lane + source], m)

    return run


@operation("redux")
def _reduce(name: str, parts: list[str], args: list[str]) -> Run:
    function, dtype = {"add": np.add, "min": np.minimum, "max": np.maximum}[parts[1]], TYPES[parts[-1]]

    def run(p: Program, m: np.ndarray | None) -> None:
        _whole_warps(p, m, name)
        values = np.broadcast_to(p.get(args[1], dtype), len(p.thread))
        members = np.broadcast_to(p.get(args[2], TYPES["u32"]), len(p.thread))
        taking_part = (members >> (p.thread % WARP).astype(np.uint32)) & 1 == 1
        out = np.zeros(len(p.thread), dtype)
        for warp in range(len(p.thread) // WARP):
            mine = (p.thread // WARP == warp) & taking_part
            if mine.any():
                out[mine] = function.reduce(values[mine], dtype=dtype)
        p.put(args[0], out, m)

    return run


@operation("mma")
def _matrix(name: str, parts: list[str], args: list[str]) -> Run:
    """D = A B + C of float64. Lane 4 g + t of a warp has A's rows g (and g + 8) at columns t, t + 4, ..., B's column g
    at the same, and of C and D entries 2 t and 2 t + 1 of those rows."""
    shape = re.fullmatch(r"m(8|16)n8k(4|8|16)", parts[2])
    if not shape or parts[-1] != "f64":
        raise NotImplementedError(".".join([name, *parts]))
    M, K = int(shape[1]), int(shape[2])

    def run(p: Program, m: np.ndarray | None) -> None:
        _whole_warps(p, m, name)

        def matrices(operand: str, order: Sequence[int], *sizes: int) -> np.ndarray:
            """Registers (warp, ..., row or column g, t), the dots in the order of the registers."""
            held = [np.broadcast_to(p.get(x, TYPES["f64"]), len(p.thread)) for x in _split(operand)]
            return np.stack(held, 1).reshape(-1, 8, 4, *sizes).transpose(0, *(at + 1 for at in order))

        A = matrices(args[1], (3, 0, 2, 1), K // 4, M // 8).reshape(-1, M, K)  # g, t, block of columns, half
        B = matrices(args[2], (2, 1, 0), K // 4).reshape(-1, K, 8)
        C = matrices(args[3], (2, 0, 1, 3), M // 8, 2).reshape(-1, M, 8)
        D = (C + A @ B).reshape(-1, M // 8, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(len(p.thread), -1)
        for at, register in enumerate(_split(args[0])):
            p.put(register, D[:, at], m)

    return run


@operation("cp")
def _copy(name: str, parts: list[str], args: list[str]) -> Run:
    """cp.async, done at once."""
    if "shared" not in parts:
        return lambda p, m: None

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
        out[some] = load(p.memory, _addresses(p, args[1], m)[some], size, reading)
        store(p.shared, _addresses(p, args[0], m), out, p.threads(m))

    return run


# ------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------


def live_memory(where: str) -> Memory:
    """Whatever belongs to a tensor of this process."""
    regions = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided:
            try:
                storage = x.untyped_storage()
                start = storage.data_ptr() if storage.nbytes() else 0
            except (RuntimeError, NotImplementedError):  # fake tensors, and what compiling left behind
                continue
            if start:
                regions[start] = storage
    return Memory([Region(start, _bytes_of(storage)) for start, storage in regions.items()], f"{where}, global memory")


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def flattened(arguments: Sequence[Any]) -> Iterator[Any]:
    for value in arguments:
        if isinstance(value, tuple):
            yield from flattened(value)
        elif value is not None:
            yield value


def execute(ptx: str, shared: int, programs: int, arguments: Sequence[Any]) -> None:
    """A launch. Arguments as they are passed: tensors and integers, tuples flattened, None left out."""
    code = _codes.get(ptx) or _codes.setdefault(ptx, parse(ptx))
    passed = [x.data_ptr() if isinstance(x, torch.Tensor) else x & (1 << 64) - 1 for x in flattened(arguments)]
    passed += [0] * (len(code.parameters) - len(passed))  # Triton's own, for scratch memory
    parameters = dict(zip(code.parameters, passed, strict=True))
    memory = live_memory(code.name)
    with np.errstate(all="ignore"):
        for at in range(programs):
            Program(code, parameters, memory, shared, at, programs).run()


_codes: dict[str, Code] = {}


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

    def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
        return None if device.type == "cpu" else f"no {device.type} here"

    backend = ops.available["triton"]
    pairs = {name: pair._replace(rejects=rejects) for name, pair in backend.pairs.items()}
    ops.available["triton"] = backend._replace(rejects=rejects, pairs=pairs)


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
        code = _codes.get(ptx) or _codes.setdefault(ptx, parse(ptx))
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
