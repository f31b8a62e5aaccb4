"""How long a multiprocessor takes for a block, simulated from machine code.

One warp is followed through the code: in order, an instruction at a time, with stall cycles and scoreboards
as the compiler wrote them into each. Units that warps share take as long as all warps of a scheduler need.
Loops run as often as the launch makes them: a few times in the simulation, then with the last one's period.

Throughputs: CUDA C++ programming guide, table of arithmetic instructions, compute capability 9.0. Latencies:
published microbenchmarks of Hopper, rounded.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

SCHEDULERS = 4  # of a multiprocessor, each with its units
PIPES = ("issue", "tensor", "mufu", "fma", "alu", "lsu")
FMA = r"FFMA|FADD|FMUL|H(FMA2|ADD2|MUL2)"
HALF_FMA = r"IMAD|D(ADD|FMA|MUL|SETP)"
LSU = r"LDG|LDGSTS|STG|LDS|STS|LDSM|STSM|ATOM|ATOMS|ATOMG|RED|REDG|SHFL|LDL|STL"
TRANSCENDENTAL = r"MUFU|F2F|F2I|I2F|FRND"
CONTROL = (
    r"BRA|EXIT|NOP|BAR|DEPBAR|WARPGROUP|WARPSYNC|BSSY|BSYNC|CALL|RET|MEMBAR|FENCE|LDGDEPBAR|LDC|S2R|CS2R"
    r"|R2UR|U\w+|SYNCS|ELECT|ARRIVES|CCTL|ERRBAR|YIELD|NANOSLEEP|VOTE|VOTEU|P2R|R2P|S2UR"
)
MEMORY, SHARED, SPECIAL, BARRIER = 600, 30, 20, 20  # cycles until a result is there
NARROW = 100  # of loads of less than 4 bytes: most find in L1 what a neighbour fetched
PERIODS = 4  # of a loop, before it repeats itself
NONE = 7  # no scoreboard
ANNOUNCE, POLL = "SYNCS.ARRIVE", "SYNCS.PHASECHK"  # that tensor descriptors load; whether it is there
MMA_RATE = 0.62  # of mma.sync on Hopper, of the peak that wgmma reaches


class Instruction(NamedTuple):
    """Of machine code.

    Attributes:
        name: with its modifiers.
        stall: cycles until the next may issue.
        sets, reads: scoreboard that is set until its result is there, or its operands are read; 7 is none.
        waits: scoreboards that must be free.
        pipe: that it occupies, beside issue.
        cycles: that the pipe of a scheduler needs for a warp.
        latency: of its result.
    """

    name: str
    stall: int
    sets: int
    reads: int
    waits: tuple[int, ...]
    pipe: str
    cycles: float
    latency: int


@dataclass
class Loop:
    """Code that repeats, with loops inside."""

    body: list[Instruction | Loop] = field(default_factory=list)

    def loops(self) -> Iterator[tuple[int, Loop]]:
        """Loops inside, in order, with how many are around them."""
        for item in self.body:
            if isinstance(item, Loop):
                yield 0, item
                yield from ((depth + 1, loop) for depth, loop in item.loops())


@cache
def parse(sass: str, flattened: bool = False) -> Loop:
    """The code of a kernel, from `nvdisasm -hex -c`, without the subroutines after it.

    If Triton `flattened` a loop over tiles and the one over steps inside, they are two again.
    """
    items: list[Instruction | str] = []
    pending = ""
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            items.append(label[1])
        elif re.match(r"\$\w+.*:$", line):  # a subroutine: slow paths that are rarely taken
            break
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\* 0x", line):
            pending = instruction[1].strip()
        elif pending and (word := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            code = _instruction(pending, int(word[1], 16) >> 41)
            pending = ""
            if code.name.startswith("BRA") and str(items[-1]) in code.name:  # to itself: the end
                break
            if not (code.name.startswith("BRA") and _name(items[-1]).startswith(POLL)):  # again, and back
                items.append(code)
    return _nest(_unflattened(items) if flattened else items)


def _name(item: Instruction | str) -> str:
    return item.name if isinstance(item, Instruction) else ""


def _jumps(items: Sequence[Instruction | str]) -> list[tuple[int, int]]:
    """Where branches are, and where they lead."""
    labels = {item: at for at, item in enumerate(items) if isinstance(item, str)}
    names = ((at, _name(item)) for at, item in enumerate(items))
    branches = ((at, name.partition("`(")[2].rstrip(")")) for at, name in names if name.startswith("BRA"))
    return [(at, labels.get(target, at)) for at, target in branches]


def _unflattened(items: list[Instruction | str]) -> list[Instruction | str]:
    """A tile is steps without what branches inside of the only loop skip, and a step with all of it."""
    jumps = _jumps(items)
    loops = [(target, at) for at, target in jumps if target < at - 1]
    if len(loops) != 1:
        return items
    first, last = loops[0]
    again = items[last]
    assert isinstance(again, Instruction)
    skipped = {n for at, target in jumps if first < at < target < last for n in range(at + 1, target)}
    steps = [items[n] for n in range(first, last + 1) if n not in skipped]
    tile = [".L_tile", *steps, *items[first + 1 : last], again._replace(name="BRA `(.L_tile)")]
    return [*items[:first], *tile, *items[last + 1 :]]


def _nest(items: Sequence[Instruction | str]) -> Loop:
    starts: dict[int, list[int]] = {}
    for at, target in _jumps(items):
        if target < at - 1:
            starts.setdefault(target, []).append(at)
    open_loops, ends = [Loop()], [len(items)]
    for at, item in enumerate(items):
        for end in sorted(starts.get(at, ()), reverse=True)[:1]:
            loop = Loop()
            open_loops[-1].body.append(loop)
            open_loops.append(loop)
            ends.append(end)
        if isinstance(item, Instruction):
            open_loops[-1].body.append(item)
        while len(ends) > 1 and at == ends[-1]:
            open_loops.pop()
            ends.pop()
    return open_loops[0]


def _instruction(text: str, control: int) -> Instruction:
    name = re.sub(r"^@!?U?P\w+\s+", "", text)
    words = name.split()[0]
    pipe, cycles, latency = _unit(words)
    if re.match("BRA|HGMMA|.*DEPBAR.LE", words):
        words = name  # with its operands
    waits = tuple(i for i in range(6) if control >> 11 & 1 << i)
    return Instruction(words, control & 15, control >> 5 & 7, control >> 8 & 7, waits, pipe, cycles, latency)


def _unit(name: str) -> tuple[str, float, int]:
    """Pipe, its cycles for a warp, and the latency."""
    base = name.partition(".")[0]
    if base == "HGMMA":
        columns = re.search(r"64x(\d+)x", name)
        return "tensor", int(columns[1]) / 2 if columns else 128, 0
    if base in ("HMMA", "IMMA"):
        return "tensor", (4 if ".16816." in name else 2) / MMA_RATE, SHARED
    if re.fullmatch(LSU, base):
        width = re.search(r"\.(64|128)\b", name)
        size = int(width[1]) // 32 if width else int(name[-1]) if "LDSM" in name and name[-1] in "24" else 1
        far = NARROW if re.search(r"\.[US](8|16)\b", name) else MEMORY
        return "lsu", SCHEDULERS * size, far if re.match(r"LDG|ATOM|RED", base) else SHARED
    if re.fullmatch(TRANSCENDENTAL, base):
        return "mufu", 8, SPECIAL
    if re.fullmatch(FMA, base):
        return "fma", 1, 0
    if re.fullmatch(HALF_FMA, base):
        return "fma", 2, SPECIAL
    if re.fullmatch(CONTROL, base):
        return "issue", 1, BARRIER
    return "alu", 2, SPECIAL


@dataclass
class Warp:
    """The warp that is followed, and the units of its scheduler; times in cycles.

    Attributes:
        sharing: warps of the block on a scheduler.
        tensor: cycles of the matrix unit for one that the code asks for; more than 1 where power limits it.
    """

    sharing: float
    tensor: float
    now: float = 0.0
    used: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))
    free: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))
    boards: list[float] = field(default_factory=lambda: [0.0] * 8)
    products: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    copies: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    tiles: deque[float] = field(default_factory=deque)

    def run(self, body: Sequence[Instruction | Loop], trips: Iterator[float]) -> None:
        """Take code; `trips` gives those of its loops in order."""
        for item in body:
            if isinstance(item, Loop):
                self._repeat(item, next(trips), [next(trips) for _ in item.loops()])
            else:
                self._issue(item)

    def _repeat(self, loop: Loop, trips: float, inner: list[float]) -> None:
        period, before = 0.0, dict(self.used)
        for _ in range(whole := min(math.ceil(trips), PERIODS)):
            started, before = self.now, dict(self.used)
            self.run(loop.body, iter(inner))
            period = self.now - started
        rest = trips - whole  # less than nothing where a share of the programs goes round once more
        self._skip(rest * period)
        self.used = {pipe: value + rest * (value - before[pipe]) for pipe, value in self.used.items()}

    def _skip(self, cycles: float) -> None:
        self.now += cycles
        self.free = {pipe: time + cycles for pipe, time in self.free.items()}
        self.boards = [time + cycles for time in self.boards]
        self.products = deque((time + cycles for time in self.products), 64)
        self.copies = deque((time + cycles for time in self.copies), 64)
        self.tiles = deque(time + cycles for time in self.tiles)

    def _issue(self, code: Instruction) -> None:
        name, pipe = code.name, code.pipe
        cycles = code.cycles * (self.tensor if pipe == "tensor" else 1.0)
        time = max([self.now, *(self.boards[i] for i in code.waits)])
        if "DEPBAR.LE" in name:
            left = int(name.rpartition("0x")[2].split(",")[0].strip() or "0", 16)
            queue = self.products if name.startswith("WARPGROUP") else self.copies
            if len(queue) > left:
                time = max(time, queue[-1 - left])
        elif name.startswith("LDGDEPBAR"):
            self.copies.append(time + MEMORY)
        elif name.startswith(ANNOUNCE):
            self.tiles.append(time + MEMORY)
        elif name.startswith(POLL) and self.tiles:
            time = max(time, self.tiles.popleft())
        self.used["issue"] += 1
        if pipe != "issue":
            self.used[pipe] += cycles
            asynchronous = name.startswith("HGMMA")
            begins = max(time, self.free[pipe])
            self.free[pipe] = begins + cycles * self.sharing
            if not asynchronous:
                time = begins
            elif "gsb0" in name:
                self.products.append(self.free[pipe])
        for board, latency in ((code.sets, code.latency), (code.reads, SPECIAL)):
            if board != NONE:
                self.boards[board] = max(self.boards[board], time + latency + cycles)
        self.now = time + max(code.stall, self.sharing)


class Block(NamedTuple):
    """Cycles of a block: alone on a processor, and of the unit that it keeps busiest, by pipe."""

    alone: float
    busy: dict[str, float]


def simulate(code: Loop, warps: int, trips: Sequence[float], tensor: float) -> Block:
    """A block of so many warps whose loops repeat so often."""
    sharing = max(warps / SCHEDULERS, 1.0)
    warp = Warp(sharing, tensor)
    warp.run(code.body, iter(trips))
    return Block(warp.now, {pipe: cycles * warps / SCHEDULERS for pipe, cycles in warp.used.items()})
