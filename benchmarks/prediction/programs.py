"""What programs of a launch do, found by evaluating a kernel's Triton IR on the launch's arguments.

Bounds of loops, conditions and masks are arithmetic on arguments and the program's number. What depends on
data is unknown unless the data came from the host, such as tables of sizes.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

SAMPLES = 16  # programs of a grid that are looked at
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
BYTES |= {"f8E4M3FN": 1, "f8E5M2": 1}
SAME = ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "tt.bitcast")
SHAPES = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans")
POINTERS = (*SAME, *SHAPES, "tt.addptr", "tt.advance", "tt.make_tensor_descriptor")
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": operator.floordiv,
    "divui": operator.floordiv,
    "remsi": operator.mod,
    "remui": operator.mod,
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
}
COMPARE = {f"{sign}{how}": getattr(operator, how) for sign in "su" for how in ("lt", "le", "gt", "ge")}
COMPARE |= {"eq": operator.eq, "ne": operator.ne}
REDUCE: dict[str, Callable[..., Any]] = {"arith.addi": np.sum, "arith.maxsi": np.max, "arith.minsi": np.min}


class Unknown(Exception):
    """A value that depends on data."""


@dataclass(frozen=True)
class Extent:
    """A tensor argument: how many bytes, and its elements, as those of int64, where the host gave them."""

    size: int
    content: bytes | None = None


@dataclass
class Node:
    """An operation of Triton's IR, with what it names and the operations inside."""

    kind: str
    result: str
    text: str
    operands: list[str]
    bodies: list[list[Node]] = field(default_factory=list)
    flattened: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the last tensor type that it states."""
        matches = re.findall(r"tensor<((?:\d+x)+)", self.text)
        return tuple(map(int, matches[-1].split("x")[:-1])) if matches else ()

    def number(self, attribute: str) -> int:
        """Of an attribute."""
        match = re.search(rf"\b{attribute} = (\d+)", self.text)
        if match is None:
            raise ValueError(f"{self.kind}: expected the attribute {attribute}, got {self.text}")
        return int(match[1])

    @property
    def element(self) -> int:
        """Bytes of an element that an access moves."""
        matches = re.findall(r"ptr<(\w+)>", self.text) or re.findall(r"x([a-z]\w*)>", self.text)
        return BYTES.get(matches[-1], 8) if matches else 8


def parse(ttir: str) -> list[Node]:
    """The operations of the kernel."""
    top: list[Node] = []
    open_bodies = [top]
    for line in re.sub(r" loc\(.*", "", ttir[ttir.index("tt.func") :], flags=re.MULTILINE).splitlines()[1:]:
        text = line.strip()
        if text.startswith("}"):
            open_bodies.pop()
            if not open_bodies:
                break
            open_bodies[-1][-1].flattened = "tt.flatten" in text
            if text.endswith("{"):  # } else {
                owner = open_bodies[-1][-1]
                owner.bodies.append([])
                open_bodies.append(owner.bodies[-1])
            continue
        match = re.match(r'(?:(%\w+)(?::\d+)? = )?"?([a-z_]+\.[\w.]+)"?(.*)', text)
        if match is None:
            continue
        node = Node(match[2], match[1] or "", match[3], re.findall(r"%[\w#]+", match[3]))
        open_bodies[-1].append(node)
        if text.endswith("{"):
            node.bodies.append([])
            open_bodies.append(node.bodies[-1])
    return top


@dataclass
class Program:
    """Values of a program: of one number in the grid.

    Attributes:
        nodes: by the names of their results.
        given: values by name: arguments, and variables of loops.
    """

    nodes: dict[str, Node]
    given: dict[str, Any]
    place: Sequence[int]
    grid: Sequence[int]

    def value(self, name: str) -> Any:
        """Of an integer, a tensor of them, or a pointer `(Extent, offsets)`.

        Raises:
            Unknown: it depends on data.
        """
        if name not in self.given:
            if name not in self.nodes:
                raise Unknown(name)
            self.given[name] = self._evaluate(self.nodes[name])
        return self.given[name]

    def _evaluate(self, node: Node) -> Any:
        kind = node.kind
        if kind == "arith.constant":
            return _constant(node.text)
        if kind in ("tt.get_program_id", "tt.get_num_programs"):
            source = self.place if kind.endswith("id") else self.grid
            return source["xyz".index(node.text.split()[0])]
        if kind == "tt.make_range":
            return np.arange(node.number("start"), node.number("end"))
        values = [self.value(name) for name in node.operands]
        dialect, _, short = kind.partition(".")
        if dialect == "arith" and short in BINARY:
            if re.match("div|rem|ceildiv", short) and not np.all(values[1]):
                raise Unknown(node.result)
            return BINARY[short](*values)
        return self._other(node, values)

    def _other(self, node: Node, values: list[Any]) -> Any:
        kind = node.kind
        if kind in SAME:
            return values[0] + 0 if not isinstance(values[0], tuple) else values[0]
        if kind == "arith.cmpi":
            return COMPARE[node.text.split()[0].rstrip(",")](*values)
        if kind == "arith.select":
            return np.where(*values)
        if kind == "tt.addptr":
            return values[0][0], values[0][1] + values[1]
        if kind in ("tt.splat", "tt.broadcast"):
            return _mapped(values[0], lambda x: np.broadcast_to(x, node.shape))
        if kind == "tt.expand_dims":
            return _mapped(values[0], lambda x: np.expand_dims(x, node.number("axis")))
        if kind == "tt.reduce" and (function := REDUCE.get(node.bodies[0][0].kind)):
            return function(values[0], axis=node.number("axis"))
        if kind == "tt.load" and isinstance(values[0], tuple) and values[0][0].content is not None:
            extent, at = values[0]
            mask = values[1] if len(values) > 1 else True
            gathered = np.frombuffer(extent.content, np.int64)[np.where(mask, at, 0)]
            return np.where(mask, gathered, values[2] if len(values) > 2 else 0)
        raise Unknown(node.result)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    return (value[0], function(value[1])) if isinstance(value, tuple) else function(value)


def _constant(text: str) -> Any:
    literal = re.match(r" (?:dense<)?(true|false|-?\d+)>?\s*:\s*(.*)", text)
    if literal is None or "x" in literal[1]:
        raise Unknown(text)
    number: Any = {"true": True, "false": False}.get(literal[1]) if literal[1][0] in "tf" else int(literal[1])
    shape = re.match(r"tensor<((?:\d+x)+)", literal[2])
    return np.full(tuple(map(int, shape[1].split("x")[:-1])), number) if shape else number


@dataclass
class Work:
    """What a program of a launch does on average.

    Attributes:
        trips: of each loop, in the order of the code, in one run of what is around it.
        nesting: of each loop, how many loops are around it.
        loaded, stored: bytes by the argument they belong to; "" is for addresses out of tables.
        unknown: loops whose trips depend on data; they count as one.
        flattened: whether a loop over tiles and the one inside are made one, as in persistent programs.
    """

    trips: list[float] = field(default_factory=list)
    nesting: list[int] = field(default_factory=list)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    flattened: bool = False


class Walk:
    """Adds up what one program does."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.origins: dict[str, str] = {}  # of what loops carry: with what it begins
        self.work = Work()

    def run(self, body: list[Node], times: float = 1.0, depth: int = 0) -> None:
        """Take a body that runs so many times."""
        for node in body:  # bodies beside each other may use the same names
            self.program.nodes[node.result] = node
            self.program.given.pop(node.result, None)
        for node in body:
            if node.kind in ("scf.for", "scf.while"):
                self._loop(node, times, depth)
            elif node.kind == "scf.if":
                taken = bool(self._known(node.operands[0], True))
                for inside, branch in zip((taken, not taken), node.bodies, strict=False):
                    self.run(branch, times * inside, depth)
            elif node.kind in ("tt.load", "tt.descriptor_load"):
                self.work.loaded[self._origin(node.operands[0])] += times * self._moved(node, 1)  # type: ignore[assignment]
            elif node.kind in ("tt.store", "tt.descriptor_store", "tt.atomic_rmw"):
                self.work.stored[self._origin(node.operands[0])] += times * self._moved(node, 2)  # type: ignore[assignment]

    def _loop(self, node: Node, times: float, depth: int) -> None:
        trips, names = 1.0, node.operands
        self.origins |= re.findall(r"(%\w+) = (%[\w#]+)", node.text.partition("iter_args")[2])
        try:
            if node.kind != "scf.for":
                raise Unknown(node.result)
            low, high, step = (int(self.program.value(name)) for name in names[1:4])
            trips = max(0, -(-(high - low) // step))
            self.program.given[names[0]] = low
        except Unknown:
            self.work.unknown += 1
        self.work.flattened |= node.flattened
        self.work.trips.append(trips if times else 0.0)
        self.work.nesting.append(depth)
        for body in node.bodies:
            self.run(body, times * trips, depth + 1)

    def _known(self, name: str, otherwise: Any) -> Any:
        try:
            return self.program.value(name)
        except Unknown:
            return otherwise

    def _moved(self, node: Node, mask_at: int) -> float:
        """Bytes: of elements that a mask leaves."""
        count = math.prod(node.shape)
        if not node.kind.startswith("tt.descriptor") and len(node.operands) > mask_at:
            count = int(
                np.count_nonzero(np.broadcast_to(self._known(node.operands[mask_at], True), node.shape))
            )
        return count * node.element

    def _origin(self, name: str) -> str:
        """The argument that a pointer points into."""
        while name in self.program.nodes or name in self.origins:
            if name in self.origins:
                name = self.origins[name]
            elif (node := self.program.nodes[name]).kind in POINTERS:
                name = node.operands[0]
            else:
                return ""
        return name


def work_of(
    ttir: str, grid: tuple[int, int, int], arguments: Mapping[str, Any], numbers: Sequence[int] = ()
) -> Work:
    """What the programs of a grid do on average, from a sample of them, or those of some numbers.

    Args:
        ttir: Triton's IR of the kernel.
        grid: programs along x, y and z.
        arguments: integers and `Extent`s by name.
    """
    body = parse(ttir)
    given = {f"%{k}": (v, 0) if isinstance(v, Extent) else v for k, v in arguments.items()}
    count = math.prod(grid)
    sample = [int((i + 0.5) * count / SAMPLES) for i in range(SAMPLES)] if count > SAMPLES else range(count)
    works = []
    for number in numbers or sample:
        place = number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]
        walk = Walk(Program({}, dict(given), place, grid))
        walk.run(body)
        works.append(walk.work)
    return _mean(works)


def _mean(works: list[Work]) -> Work:
    def mean(counters: list[Counter[str]]) -> Counter[str]:
        total = reduce(operator.add, counters)
        return Counter({name: size / len(works) for name, size in total.items()})

    return Work(
        [sum(trips) / len(works) for trips in zip(*(w.trips for w in works), strict=True)],
        works[0].nesting,
        mean([w.loaded for w in works]),
        mean([w.stored for w in works]),
        works[0].unknown,
        works[0].flattened,
    )
