"""What is wrong with a compiled step, by name. Each rule reads the program, not the plan's intention."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nanoflow_jax.inspect.costs import (
    FREE,
    collective_kind,
    dots,
    fusion_bytes,
    gemm_pieces,
    inner_collective,
    is_library_gemm,
    kernel_pieces,
    mosaic_call,
    operand_bytes,
)
from nanoflow_jax.inspect.hlo import Computation, Instruction, Module, Piece
from nanoflow_jax.inspect.hlo_words import MOSAIC
from nanoflow_jax.inspect.overlap import is_sync
from nanoflow_jax.plan.ops import GEMM, OPS, of_kind
from nanoflow_jax.timeline.timeline import Timeline

MOVES = frozenset(
    """copy transpose slice dynamic-slice convert reshape bitcast concatenate pad reverse parameter constant tuple
    broadcast get-tuple-element""".split()  # noqa: SIM905
)
NARROW = re.compile(r"[su][248]$|f8|f4")
INDEX = re.compile(r"[su](16|32|64)$|pred$")
PAGES = re.compile(r"page|cache")  # what the step's arguments for KV pages are called
KERNELS = frozenset(["fusion", "copy", "transpose", "convert", "add", "multiply", "reduce", "gather", "scatter"])
LARGE = 2**20  # bytes
ALIGNED = 256  # bytes: what Mosaic's custom calls require of every address
TINY = 256  # bytes: a scale of a layer's KV pages, say; a copy of so little is none
STACK = 256  # a leading dimension up to this is taken for stacked layers, not for pages


@dataclass(frozen=True)
class Finding:
    """kind: merged_gemm, merged_collective, weight_copy, kv_copy, transpose_before_collective, synchronous_collective,
    exposed_collective, untraced_gemm, untraced_collective, untraced_kernel, misaligned_slice or unknown_hlo. op and
    layer: None when untraced."""

    kind: str
    op: str | None
    layer: int | None
    detail: str


@dataclass(frozen=True)
class Group:
    """Findings of one kind and op: how many, the layers where they are, and the first one's detail."""

    kind: str
    op: str | None
    count: int
    layers: tuple[int, ...]
    detail: str


def grouped(findings: Sequence[Finding]) -> list[Group]:
    """In the order in which they were found."""
    found: dict[tuple[str, str | None], list[Finding]] = {}
    for finding in findings:
        found.setdefault((finding.kind, finding.op), []).append(finding)
    return [
        Group(kind, op, len(same), tuple(sorted({f.layer for f in same if f.layer is not None})), same[0].detail)
        for (kind, op), same in found.items()
    ]


@dataclass(frozen=True)
class _Program:
    """The computations that run as kernels' sequences (entry, loop bodies, regions), and who calls each computation."""

    module: Module
    running: tuple[Computation, ...]
    callers: Mapping[str, tuple[Computation, Instruction]]

    @staticmethod
    def of(module: Module) -> _Program:
        callers = {n: (c, i) for c in module.computations.values() for i in c.instructions for n in i.called}
        running, queue = [], [module.entry]
        while queue:
            computation = queue.pop()
            running.append(computation)
            for instruction in computation.instructions:
                if instruction.base in ("while", "conditional", "call"):
                    queue += [c for c in module.called(instruction) if c not in running and c not in queue]
        return _Program(module, tuple(running), callers)

    def parameter(self, computation: Computation, name: str, element: int | None = None) -> Instruction | None:
        """The entry parameter that a value is, looking through bitcasts, tuples, loops and fusions; None for
        another."""
        found = computation.by_name.get(name)
        if found is None:
            return None
        if found.opcode == "get-tuple-element":
            return self.parameter(computation, found.operands[0], int(found.attributes["index"]))
        if found.opcode == "tuple" and element is not None:
            return self.parameter(computation, found.operands[element])
        if found.opcode in ("bitcast", "opt-barrier", "while"):
            return self.parameter(computation, found.operands[0], element)
        if found.opcode == "parameter":
            if computation.is_entry:
                return found
            if computation.name in self.callers:
                outer, caller = self.callers[computation.name]
                return self.parameter(outer, caller.operands[int(found.literal)], element)
        return None

    def producer(self, computation: Computation, name: str) -> Instruction | None:
        """The instruction that computes a value, looking through bitcasts and tuple elements."""
        found = computation.by_name.get(name)
        while found is not None and found.opcode in ("bitcast", "get-tuple-element"):
            found = computation.by_name.get(found.operands[0])
        return found

    def traced(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether an instruction, or the fusion, region or loop that runs it, carries the name of an op piece."""
        while not instruction.pieces:
            if computation.name not in self.callers:
                return False
            computation, instruction = self.callers[computation.name]
        return True

    def is_gemm(self, instruction: Instruction) -> bool:
        if instruction.opcode.endswith("-done") or instruction.base in ("while", "conditional", "call", "async"):
            return False
        if "/grouped_gemm/" in instruction.op_name and mosaic_call(self.module, instruction) is not None:
            return True
        return is_library_gemm(instruction) or instruction.opcode == "dot" or any(dots(self.module, instruction))


def _where(piece: Piece | None) -> tuple[str | None, int | None]:
    return (piece.op, piece.layer) if piece else (None, None)


def _joined(program: _Program, computation: Computation, instruction: Instruction) -> Instruction | None:
    """A concatenation of activations, made by XLA, that feeds an instruction; one written in the program ends so
    in op_name."""
    candidates = [(c, i) for c in program.module.called(instruction) for i in c.instructions]
    for name in instruction.operands:
        made = program.producer(computation, name)
        if made is not None and made.opcode == "fusion":
            candidates += [(c, c.root) for c in program.module.called(made)]
        elif made is not None:
            candidates.append((computation, made))
    for inner, candidate in candidates:
        if candidate.opcode != "concatenate" or candidate.op_name.endswith("/concatenate"):
            continue
        if not any(program.parameter(inner, name) for name in candidate.operands):
            return candidate
    return None


def expected_pieces(module: Module) -> dict[str, set[int]]:
    """Pieces of each GEMM op that the program was traced with, from every op_name, fused instructions' included."""
    seen: dict[str, set[int]] = {}
    nano_batches: set[int] = set()
    for computation in module.computations.values():
        for piece in {piece for instruction in computation.instructions for piece in instruction.pieces}:
            seen.setdefault(piece.op, set()).add(piece.piece)
            if piece.op in OPS and not OPS[piece.op].splittable:
                nano_batches.add(piece.piece)
    return {op: seen[op] if OPS[op].splittable else nano_batches for op in of_kind(GEMM) if op in seen}


def merged_gemms(program: _Program) -> Iterator[Finding]:
    """GEMMs that do the work of several pieces: named so, fed by a joined operand, or the only one left of the
    op's pieces."""
    expected = expected_pieces(program.module)
    found: dict[tuple[int | None, str], dict[int, Instruction]] = {}
    merged: set[tuple[int | None, str | None]] = set()
    for computation in program.running:
        for instruction in computation.instructions:
            if not program.is_gemm(instruction):
                continue
            pieces = gemm_pieces(program.module, instruction)
            if not pieces:
                yield Finding("untraced_gemm", None, None, f"{instruction.name}: op_name {instruction.op_name!r}")
                continue
            if pieces[0].op not in of_kind(GEMM):
                continue
            names = sorted({str(piece) for piece in pieces})
            joined = _joined(program, computation, instruction)
            op, layer = _where(pieces[0])
            merged |= {(layer, op)} if joined is not None or len(names) > 1 else set()
            if len(names) > 1:
                yield Finding("merged_gemm", op, layer, f"{instruction.name} computes {' and '.join(names)}")
            elif joined is not None:
                rows = f"{joined.shapes[0].dtype}{list(joined.shapes[0].dims)}"
                yield Finding(
                    "merged_gemm", op, layer, f"{instruction.name} ({names[0]}) multiplies joined rows {rows}"
                )
            for piece in pieces:
                found.setdefault((piece.layer, piece.op), {})[piece.piece] = instruction
    layers = {
        piece.layer for c in program.running for i in c.instructions for piece in i.pieces if piece.op in of_kind(GEMM)
    }
    for layer, op in sorted(((layer, op) for layer in layers for op in expected), key=str):
        if (layer, op) not in found and (layer, op) not in merged:
            yield Finding("untraced_gemm", op, layer, f"no GEMM of {op} was found in this layer")
    for (layer, op), gemms in found.items():
        if (layer, op) in merged:
            continue
        for piece in sorted(expected.get(op, set()) - set(gemms)):
            taker = max(gemms.values(), key=lambda gemm: gemm.bytes)
            detail = f"{op}.{piece} has no GEMM of its own; {taker.name} gives {list(taker.shapes[0].dims)}"
            yield Finding("merged_gemm", op, layer, detail)


def collective_faults(program: _Program) -> Iterator[Finding]:
    """Collectives that are merged, synchronous, untraced, or fed by a transpose."""
    for computation in program.running:
        for instruction in computation.instructions:
            kind = collective_kind(program.module, instruction)
            if not kind:
                continue
            pieces = instruction.pieces or inner_collective(program.module, instruction).pieces
            op, layer = _where(pieces[0] if pieces else None)
            if not pieces:
                yield Finding(
                    "untraced_collective", None, None, f"{kind} {instruction.name}: op_name {instruction.op_name!r}"
                )
            several = (
                len(instruction.operands) > 1 and len(pieces) != 1
            )  # values and scales of one piece are one gather
            if len(pieces) > 1 or several or _joined(program, computation, instruction):
                what = " and ".join(map(str, pieces)) or f"{len(instruction.operands)} tensors"
                yield Finding("merged_collective", op, layer, f"{kind} {instruction.name} moves {what}")
            if is_sync(instruction):
                yield Finding(
                    "synchronous_collective", op, layer, f"{kind} {instruction.name} blocks the compute stream"
                )
            for name in instruction.operands:
                made = program.producer(computation, name)
                root = made
                if made is not None and made.base == "fusion":
                    for inner in program.module.called(made):
                        root = program.producer(inner, inner.root.name)
                written = made is not None and made.op_name.endswith("/transpose")  # by the program, not by XLA
                if made is not None and root is not None and root.opcode in ("transpose", "copy") and not written:
                    detail = f"{made.name} rearranges {list(made.shapes[0].dims)} for {instruction.name}"
                    yield Finding("transpose_before_collective", op, layer, detail)


def untraced_kernels(program: _Program) -> Iterator[Finding]:
    """Custom calls (Mosaic kernels, sorts), and other kernels that move a MiB or more, of no op piece: their time and
    bytes count for no op and no layer."""
    for computation in program.running:
        for kernel in computation.instructions:
            if kernel.base not in KERNELS or program.is_gemm(kernel) or collective_kind(program.module, kernel):
                continue
            if kernel_pieces(program.module, computation, kernel) or program.traced(computation, kernel):
                continue
            inner = [i for called in program.module.called(kernel) for i in called.instructions]
            if any(i.opcode == "custom-call" for i in inner) or _moved(program, computation, kernel):
                continue  # reported below, or by `copies`
            reads = [i for n in kernel.operands if (i := computation.by_name.get(n)) and i.opcode != "constant"]
            moved = operand_bytes(computation, kernel) + kernel.bytes
            if kernel.opcode == "fusion":
                moved = fusion_bytes(program.module, computation, kernel)
            if reads and moved >= LARGE:  # what reads nothing makes the zeros that a loop starts from
                detail = f"{kernel.opcode} {kernel.name} moves {moved} bytes: op_name {kernel.op_name!r}"
                yield Finding("untraced_kernel", None, None, detail)
    for computation in program.module.computations.values():
        for call in computation.instructions:
            if call.opcode != "custom-call" or is_library_gemm(call) or call.target == "AllocateBuffer":
                continue
            if not program.traced(computation, call):
                detail = f"custom call {call.target!r}, {call.name}: op_name {call.op_name!r}"
                yield Finding("untraced_kernel", None, None, detail)


def _moved(program: _Program, computation: Computation, instruction: Instruction) -> list[Instruction]:
    """Entry parameters that an instruction only moves (or widens), [] when it computes something."""
    sources = [found for name in instruction.operands if (found := program.parameter(computation, name)) is not None]
    narrow = [source for source in sources if NARROW.match(source.shapes[0].dtype)]
    if instruction.base in ("fusion", "async"):
        for inner in program.module.called(instruction):
            large = [
                i for i in inner.instructions if any(s.elements > 1 and not INDEX.match(s.dtype) for s in i.shapes)
            ]
            if not all(i.opcode in MOVES for i in large):
                widened = all(i.opcode in MOVES or i.opcode == "multiply" for i in large)
                return narrow if widened else []
        return sources if program.module.called(instruction) else []
    if instruction.base == "copy" and not sources:  # of an updated page pool: no longer the parameter, but as large
        made = instruction.shapes[0]
        entry = program.module.entry.instructions
        pools = [i for i in entry if i.opcode == "parameter" and PAGES.search(i.op_name)]
        return [i for i in pools if (i.shapes[0].dtype, i.shapes[0].elements) == (made.dtype, made.elements)][:1]
    return sources if instruction.base in MOVES else []


def copies(program: _Program) -> Iterator[Finding]:
    """Copies as large as a weight, a layer of stacked weights, or a page pool: one more read and write of it per
    step."""
    for computation in program.running:
        for instruction in computation.instructions:
            if instruction.opcode in FREE or instruction.opcode.endswith("-done") or not instruction.shapes:
                continue
            if instruction.bytes < TINY:
                continue
            if any(shape.host for shape in instruction.shapes):  # offload: meant, and not in device memory
                continue
            for source in _moved(program, computation, instruction):
                shape = source.shapes[0]
                if len(shape.dims) < 2 or INDEX.match(shape.dtype):
                    continue
                stacked = shape.dims[0] if len(shape.dims) > 2 and shape.dims[0] <= STACK else 1
                if max(s.elements for s in instruction.shapes) * 2 * stacked < shape.elements:
                    continue
                kind = "kv_copy" if PAGES.search(source.op_name) else "weight_copy"
                op, layer = _where(instruction.piece)
                name = source.op_name.replace("\\'", "'") or source.name
                result = f"{instruction.shapes[0].dtype}{list(instruction.shapes[0].dims)}"
                yield Finding(
                    kind, op, layer, f"{instruction.name} makes {result} ({instruction.bytes} bytes) of {name}"
                )


def misaligned_slices(program: _Program) -> Iterator[Finding]:
    """Slices that XLA hands to a Mosaic kernel, or takes from one, as an address inside a larger array that is no
    multiple of ALIGNED bytes: the kernel refuses it, so that the program dies at its first run."""
    for computation in program.module.computations.values():
        for call in computation.instructions:
            if not call.target.startswith(MOSAIC):
                continue
            _, outside = program.callers.get(computation.name, (None, None))
            pieces = call.pieces or (outside.pieces if outside else ())
            op, layer = _where(pieces[0] if pieces else None)
            parts = [(name, f"operand {number}") for number, name in enumerate(call.operands)]
            updates = [i for i in computation.instructions if i.opcode == "dynamic-update-slice"]
            parts += [(i.name, "a result") for i in updates]
            for name, what in parts:
                offset = _slice_offset(program, computation, name)
                if offset % ALIGNED:
                    detail = f"{call.name}: {what} begins at byte {offset} of {name}'s array, no multiple of {ALIGNED}"
                    yield Finding("misaligned_slice", op, layer, detail)


def _slice_offset(program: _Program, computation: Computation, name: str) -> int:
    """Bytes from the start of the array that a value is cut from, through bitcasts and slices inside one fusion. Of a
    slice whose place is known at run time only, the distance of two places."""
    found, offset = computation.by_name.get(name), 0
    while found is not None and found.opcode in ("bitcast", "slice", "dynamic-slice", "dynamic-update-slice"):
        source = computation.by_name.get(found.operands[0])
        if source is None:
            break
        if found.opcode != "bitcast":
            shape = source.shapes[0]
            minor = [int(axis) for axis in shape.layout.split(",") if axis] or list(range(len(shape.dims)))[::-1]
            strides, step = dict.fromkeys(minor, 0), max(shape.bytes // max(shape.elements, 1), 1)
            for axis in minor:
                strides[axis], step = step, step * shape.dims[axis]
            if found.opcode == "slice":
                firsts = [int(n) for n in re.findall(r"\[(\d+):", found.attributes["slice"])]
                offset += sum(first * strides[axis] for axis, first in enumerate(firsts))
            else:  # the axes along which it can lie anywhere
                part = computation.by_name[found.operands[1]] if found.opcode == "dynamic-update-slice" else found
                free = [
                    a for a, (n, whole) in enumerate(zip(part.shapes[0].dims, shape.dims, strict=True)) if n < whole
                ]
                offset += math.gcd(*(strides[axis] for axis in free)) if free else 0
        found = source
    return offset


def find(module: Module, timeline: Timeline) -> tuple[Finding, ...]:
    """All findings of a module, without repeats. The timeline gives what is exposed although it is asynchronous."""
    program = _Program.of(module)
    rules = (merged_gemms, collective_faults, untraced_kernels, copies, misaligned_slices)
    found = [finding for rule in rules for finding in rule(program)]
    for collective in timeline.collectives:
        if collective.is_async and not collective.between and not collective.beside:
            detail = f"{collective.name} of nano-batch {collective.nano_batch} has no GEMM or attention beside it"
            found.append(Finding("exposed_collective", collective.op, collective.layer, detail))
    for (kind, text), number in Counter((u.kind, u.text) for u in module.unknown).items():
        where = next(u.where for u in module.unknown if (u.kind, u.text) == (kind, text))
        found.append(Finding("unknown_hlo", None, None, f"{kind} {text!r}, {number} times, first in {where}"))
    return tuple(dict.fromkeys(found))
