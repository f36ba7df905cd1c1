"""Reader of scheduled HLO text, as `compiled.as_text()` gives it (jax 0.11 and 0.12).

Text → `Module` of `Computation`s of `Instruction`s in scheduled order. What the reader does not know (a line, an
opcode, an attribute, a custom call) it does not skip: it goes into `Module.unknown`.

Op pieces: each piece of the step is traced under a named scope, `L3/GEMV.AG.2` in a layer, `EMBED.AR.1` outside of
them, so that an instruction's `op_name` leads back to it. XLA joins the names of merged instructions,
`L0/(D.AR.1/psum:D.AR.2/psum)`: all are read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from nanoflow_jax.inspect.hlo_words import ATTRIBUTES, CALLED, KERNELS, OPCODES
from nanoflow_jax.plan.ops import APPEND, OPS, OUTER
from nanoflow_jax.timeline.timeline import Piece

BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "s2": 2,
    "u2": 2,
    "s4": 4,
    "u4": 4,
    "f4e2m1fn": 4,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}

_NAME = re.compile(r"%([^\s,(){}=]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]()]|, ')
_PIECE = re.compile(r"(?:^|/)(?:L(\d+)/)?([A-Z]+(?:\.[A-Z]+)?)\.(\d+)(?=/|$)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TABLES = ("HloModule", "FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Shape(NamedTuple):
    """One array: `bf16[640,8192]{1,0}`. `layout` is minor-to-major; `host` says that it lives in host memory, S(5)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""
    host: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits.group()) if digits else 0
        return (self.elements * bits + 7) // 8


class Unknown(NamedTuple):
    """Something the reader does not know: `kind` is line, opcode, attribute, custom_call or dtype."""

    kind: str
    text: str
    where: str


@dataclass(frozen=True)
class Instruction:
    """One line. `shapes` are the leaves of its result, in order (of an async start: without the operands that its tuple
    repeats); `pieces` the op pieces its op_name leads to."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: dict[str, str]
    called: tuple[str, ...]
    op_name: str
    pieces: tuple[Piece, ...]
    is_root: bool = False
    literal: str = ""

    @property
    def base(self) -> str:
        """Opcode without -start, -update, -done: "all-gather" of "all-gather-start"."""
        return re.sub(r"-(start|update|done)$", "", self.opcode)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def piece(self) -> Piece | None:
        return self.pieces[0] if self.pieces else None

    @property
    def target(self) -> str:
        """Custom call's target, "" for other instructions."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def config(self) -> str:
        """Backend configuration, as text."""
        return self.attributes.get("backend_config", "")


@dataclass(frozen=True)
class Computation:
    """Instructions in scheduled order."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: dict[str, Instruction]
    is_entry: bool

    @property
    def root(self) -> Instruction:
        return next((i for i in reversed(self.instructions) if i.is_root), self.instructions[-1])


@dataclass(frozen=True)
class Module:
    """A compiled program. `unknown` holds what was not understood; empty means that everything was read."""

    name: str
    computations: dict[str, Computation]
    entry: Computation
    is_scheduled: bool
    unknown: tuple[Unknown, ...]

    def called(self, instruction: Instruction) -> tuple[Computation, ...]:
        return tuple(self.computations[name] for name in instruction.called if name in self.computations)


@dataclass
class _Reader:
    unknown: list[Unknown] = field(default_factory=list)

    def note(self, kind: str, text: str, where: str) -> None:
        self.unknown.append(Unknown(kind, text, where))


def expand_names(op_name: str) -> list[str]:
    """`a/(b/x:c/y)` → `a/b/x`, `a/c/y`. Only a group right after `/`, or at the start, is a merge; `jit(f)` is a
    name."""
    match = re.search(r"(?:^|(?<=[/:(]))\(", op_name)
    if not match:
        return [op_name]
    depth, parts, start = 0, [], match.end()
    for at in range(match.start(), len(op_name)):
        char = op_name[at]
        depth += (char == "(") - (char == ")")
        if (char == ":" and depth == 1) or depth == 0:
            parts.append(op_name[start:at])
            start = at + 1
        if depth == 0:
            names = [op_name[: match.start()] + part + op_name[at + 1 :] for part in parts]
            return [name for joined in names for name in expand_names(joined)] if len(parts) > 1 else names
    return [op_name]


def parse_pieces(op_name: str) -> tuple[Piece, ...]:
    """Op pieces named in an op_name, innermost scope of each path, without repeats, in order.

    A scope inside another's takes its layer: `L0/KQV.3/KV.APPEND.3` is layer 0's KV.APPEND.3.
    """
    found: dict[Piece, None] = {}
    for path in expand_names(op_name):
        layer, inner = None, None
        for match in _PIECE.finditer(path):
            layer = int(match.group(1)) if match.group(1) else layer
            op = match.group(2)
            if op in OUTER if layer is None else op in OPS or op == APPEND:
                inner = Piece(layer, op, int(match.group(3)))
        if inner is not None:
            found[inner] = None
    return tuple(found)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Leaves of an array or tuple shape."""
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip())
        shapes.append(Shape(dtype, sizes, layout.strip("{}").split(":")[0], "S(5)" in layout))
    return tuple(shapes)


def _closing(text: str, at: int) -> int:
    """Index after the bracket that closes the one at `at`; strings are skipped. -1 when it never closes."""
    depth = 0
    for match in _TOKEN.finditer(text, at):
        token = match.group()
        if token in "{[(":
            depth += 1
        elif token in "}])":
            depth -= 1
            if depth == 0:
                return match.end()
    return -1


def _split(text: str) -> list[str]:
    """Splits at the ", " outside of brackets and strings."""
    parts, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in "{[(":
            depth += 1
        elif token in "}])":
            depth -= 1
        elif token == ", " and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _instruction(line: str, where: str, reader: _Reader) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    root, name = head.groups()
    at = head.end()
    space = _closing(line, at) if line[at] == "(" else line.find(" ", at)
    open_at = line.find("(", space)
    close = _closing(line, open_at) if space > 0 and open_at > 0 else -1
    if close < 0:
        return None
    shape_text, opcode, inside = line[at:space], line[space:open_at].strip(), line[open_at + 1 : close - 1]
    attributes: dict[str, str] = {}
    for part in _split(line[close:].lstrip(", ")):
        key, equals, value = part.partition("=")
        if not equals or key not in ATTRIBUTES:
            reader.note("attribute", part[:80], f"{where}/{name}")
        attributes[key] = value
    if opcode not in OPCODES and re.sub(r"-(start|update|done)$", "", opcode) not in OPCODES:
        reader.note("opcode", opcode, f"{where}/{name}")
    leaf = opcode in ("constant", "parameter", "iota")
    inside = re.sub(r"/\*.*?\*/", "", inside) if not leaf else inside
    # An async start's result is ((operands), results): the operands are no work of its own.
    wrapped = opcode.endswith("-start") and shape_text.startswith("((")
    shapes = parse_shapes(shape_text[_closing(shape_text, 1) :] if wrapped else shape_text)
    for shape in shapes:
        if shape.dtype not in BITS and not re.search(r"\d", shape.dtype):
            reader.note("dtype", shape.dtype, f"{where}/{name}")
    target = attributes.get("custom_call_target", "").strip('"')
    if opcode == "custom-call" and not target.startswith(KERNELS):
        reader.note("custom_call", target, f"{where}/{name}")
    matched = _OP_NAME.search(attributes.get("metadata", ""))
    op_name = matched.group(1) if matched else ""
    return Instruction(
        name=name,
        shapes=shapes,
        opcode=opcode,
        operands=() if leaf else tuple(_NAME.findall(inside)),
        attributes=attributes,
        called=tuple(
            n.lstrip("%") for key in CALLED if key in attributes for n in re.findall(r"%?[\w.\-$]+", attributes[key])
        ),
        op_name=op_name,
        pieces=parse_pieces(op_name),
        is_root=bool(root),
        literal=inside if leaf else "",
    )


def parse(text: str) -> Module:
    """Module of an HLO text. Raises ValueError when there is no entry computation; all else unknown is collected."""
    reader, computations = _Reader(), {}
    module_name, is_scheduled, entry, table = "", False, None, ""
    current: str | None = None
    is_entry, body = False, []
    for line in text.splitlines():
        if not line.strip():
            continue
        if current is not None:
            if line.startswith("}"):
                computation = Computation(current, tuple(body), {i.name: i for i in body}, is_entry)
                computations[current] = computation
                entry = computation if is_entry else entry
                current = None
                continue
            read = _instruction(line, current, reader)
            if read is None:
                reader.note("line", line.strip()[:80], current)
            else:
                body.append(read)
        elif header := _HEADER.match(line):
            current, is_entry, body, table = (
                header.group(2) or header.group(4),
                bool(header.group(1) or header.group(3)),
                [],
                "",
            )
        elif line.startswith(_TABLES):
            table = line.split()[0].rstrip(",")
            if table == "HloModule":
                module_name, is_scheduled = line.split()[1].rstrip(","), "is_scheduled=true" in line
        elif not (table and table != "HloModule" and re.match(r"\d+ ", line)):
            reader.note("line", line[:80], "module")
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    if not is_scheduled:
        reader.note(
            "line", "is_scheduled=true is missing: the order of the text is not the order of execution", "module"
        )
    return Module(module_name, computations, entry, is_scheduled, tuple(reader.unknown))
