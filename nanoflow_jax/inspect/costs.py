"""What each instruction of a compiled program is and costs: its kind, FLOP, bytes, and for collectives the wire."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kernels_pallas.expected import LATENCY
from nanoflow_jax.cost.latency import LatencyModel, Prediction
from nanoflow_jax.inspect.hlo import Computation, Instruction, Module, Piece
from nanoflow_jax.inspect.hlo_words import COLLECTIVES, GEMM_LIBRARIES, MOSAIC
from nanoflow_jax.plan.ops import APPEND, ATTENTION, GEMM, OPS, of_kind

FREE = frozenset(
    """parameter constant bitcast tuple get-tuple-element after-all opt-barrier partition-id replica-id add-dependency
    domain async-update""".split()  # noqa: SIM905
)
READS_PART = frozenset(["slice", "dynamic-slice", "gather"])
UPDATES_PART = frozenset(["dynamic-update-slice", "scatter"])
CONTROL = frozenset(["while", "conditional", "call"])
# By (op, piece), of every layer alike, or a list of each layer's own; None: that layer has no such kernel.
Costs = Mapping[tuple[str, int], Prediction | tuple[float, float] | list[Prediction | None]]


@dataclass(frozen=True)
class Cost:
    """kind: gemm, attention, kernel (another Mosaic kernel), elementwise (all else on the GPU), collective,
    host_copy, free.

    flops, bytes: of memory; for a collective `bytes` is the whole tensor and `collective` its HLO name. pieces: of
    the GEMM or the collective inside a fusion, whose own name may be that of an epilogue.
    """

    kind: str
    prediction: Prediction
    flops: float = 0.0
    bytes: float = 0.0
    collective: str = ""
    pieces: tuple[Piece, ...] = ()


def dots(module: Module, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """Every `dot`, and every GEMM library's call, inside the computations that a fusion (or call) runs."""
    for computation in module.called(instruction):
        for inner in computation.instructions:
            if inner.opcode == "dot" or is_library_gemm(inner):
                yield computation, inner
            elif inner.opcode in ("fusion", "call"):
                yield from dots(module, inner)


def dot_flops(computation: Computation, dot: Instruction) -> float:
    """2 · result elements · contracted size, from the shapes of a dot or of a GEMM library's call."""
    lhs = computation.by_name[dot.operands[0]].shapes[0]
    if dot.opcode == "dot":
        contracted = re.findall(r"\d+", dot.attributes.get("lhs_contracting_dims", ""))
    else:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', dot.config)
        contracted = re.findall(r"\d+", found.group(1)) if found else []
    return 2.0 * dot.shapes[0].elements * math.prod(lhs.dims[int(axis)] for axis in contracted)


def gemm_size(dot: Instruction, flops: float) -> tuple[int, int, int] | None:
    """(m, n, k) of `[m, k] @ [k, n]`; None for a product of other dimensions."""
    dims = dot.shapes[0].dims
    return (dims[0], dims[1], round(flops / (2 * dims[0] * dims[1]))) if len(dims) == 2 and all(dims) else None


def gemm_pieces(module: Module, instruction: Instruction) -> tuple[Piece, ...]:
    """Op pieces of the GEMMs of an instruction: of the dots inside a fusion, where these have names."""
    inner = tuple(dict.fromkeys(piece for _, dot in dots(module, instruction) for piece in dot.pieces))
    return inner or instruction.pieces


def kernel_pieces(module: Module, computation: Computation, instruction: Instruction) -> tuple[Piece, ...]:
    """Op pieces of a kernel: its own, those of the last named instruction that is fused in it, or those of the fusion
    that it reads. XLA names no fusion whose root it made itself, such as the conversion back from a float32 sum."""
    inner = [made for called in module.called(instruction) for made in reversed(called.instructions) if made.pieces]
    if instruction.pieces or inner:
        return instruction.pieces or inner[0].pieces
    for name in instruction.operands:
        source = computation.by_name.get(name)
        if source is not None and source.base == "fusion":
            return kernel_pieces(module, computation, source)
    return ()


def is_library_gemm(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and instruction.target.startswith(GEMM_LIBRARIES)


def mosaic_call(module: Module, instruction: Instruction) -> Instruction | None:
    """The Mosaic kernel that an instruction is, or, for a fusion that only cuts its operands' rows, runs: the fusion
    may be nameless."""
    if instruction.target.startswith(MOSAIC):
        return instruction
    inner = module.called(instruction) if instruction.opcode == "fusion" else ()
    return next((i for computation in inner for i in computation.instructions if i.target.startswith(MOSAIC)), None)


def collective_kind(module: Module, instruction: Instruction) -> str:
    """HLO name of the collective that an instruction starts or runs, "" for none: also inside async and fusion
    wrappers."""
    if instruction.opcode.endswith("-done"):
        return ""
    if instruction.base in COLLECTIVES:
        return instruction.base
    if instruction.base in ("async", "fusion", "call"):
        for computation in module.called(instruction):
            for inner in computation.instructions:
                if kind := collective_kind(module, inner):
                    return kind
    return ""


def inner_collective(module: Module, instruction: Instruction) -> Instruction:
    """The collective itself, where `instruction` wraps it: it holds the replica groups."""
    if instruction.base in COLLECTIVES:
        return instruction
    for computation in module.called(instruction):
        for inner in computation.instructions:
            if collective_kind(module, inner):
                return inner_collective(module, inner)
    return instruction


def group_size(instruction: Instruction, devices: int) -> int:
    """GPUs of one replica group: `mesh['tp'=8] {'tp'}`, `{{0,1,2,3}}` or `[2,4]<=[8]`; all devices when none are
    named."""
    text = instruction.attributes.get("replica_groups", "")
    if text.startswith("mesh["):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
        axes = re.findall(r"'([^']+)'", text[text.index("]") :])
        return math.prod(sizes.get(axis, 1) for axis in axes)
    if iota := re.match(r"\[(\d+),(\d+)\]", text):
        return int(iota.group(2))
    if first := re.match(r"\{\{([\d,]+)\}", text):
        return len(first.group(1).split(","))
    return devices


def operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(computation.by_name[name].bytes for name in instruction.operands if name in computation.by_name)


def result_bytes(instruction: Instruction, of_library_gemm: bool) -> int:
    """Bytes of the results. A GEMM library's workspace, an s8 beside the result, is not written in full: left out."""
    alone = len(instruction.shapes) == 1
    return sum(s.bytes for s in instruction.shapes if alone or not of_library_gemm or s.dtype != "s8")


def fusion_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that a fusion reads and writes. A parameter of which only slices are read counts with those slices, and one
    that is updated in place (KV append) with the update: the rest of a page pool does not move."""
    total, updated = 0, 0
    for inner in module.called(instruction):
        for parameter in inner.instructions:
            if parameter.opcode != "parameter":
                continue
            users = [user for user in inner.instructions if parameter.name in user.operands]
            if users and all(user.opcode in READS_PART and user.operands[0] == parameter.name for user in users):
                total += sum(user.bytes for user in users)
            elif users and all(user.opcode in UPDATES_PART and user.operands[0] == parameter.name for user in users):
                update = sum(inner.by_name[user.operands[2 if user.opcode == "scatter" else 1]].bytes for user in users)
                total += update
                updated += sum(user.bytes for user in users)
            else:
                total += parameter.bytes
        written = result_bytes(instruction, any(is_library_gemm(i) for i in inner.instructions))
        return max(total + written - updated, total)
    return operand_bytes(computation, instruction) + instruction.bytes


def expected_us(call: Instruction) -> float | None:
    """What the program says a Mosaic kernel takes, from its tuning table."""
    found = re.search(rf'{LATENCY}="(\d+)"', call.attributes.get("frontend_attributes", ""))
    return int(found.group(1)) / 1000 if found else None


def _aliased(instruction: Instruction) -> bool:
    return "output_to_operand_aliasing" in instruction.attributes


@dataclass(frozen=True)
class CostModel:
    """Costs of the instructions of one module. `costs` gives predictions, or (FLOP, bytes), of Mosaic kernels, and of
    loops and branches, by (op, piece) and per layer; those of one piece share it."""

    module: Module
    latency: LatencyModel
    devices: int
    costs: Costs
    mosaic_calls: Mapping[Piece, int]
    loops: Mapping[Piece, int]

    @staticmethod
    def of(module: Module, latency: LatencyModel, devices: int, costs: Costs | None) -> CostModel:
        every = [i for c in module.computations.values() for i in c.instructions]
        calls = Counter(i.piece for i in every if i.target.startswith(MOSAIC) and i.piece)
        loops = Counter(i.piece for i in every if i.opcode in CONTROL and i.piece)
        return CostModel(module, latency, devices, costs or {}, calls, loops)

    def given(self, piece: Piece | None, sharers: Mapping[Piece, int]) -> Cost | None:
        """Cost that the caller gave for a piece, this kernel's or loop's share of it."""
        if piece is None or (piece.op, piece.piece) not in self.costs:
            return None
        given, parts = self.costs[piece.op, piece.piece], max(sharers[piece], 1)
        if isinstance(given, list):
            given = given[piece.layer or 0]
        if given is None:
            return None
        if isinstance(given, Prediction):
            flops, moved = given.flops / parts, given.bytes / parts
            prediction = replace(given, us=given.us / parts, flops=flops, bytes=moved)
        else:
            flops, moved = (value / parts for value in given)
            prediction = replace(self.latency.kernel(flops, moved), source="roofline of the caller's cost")
        kind = {ATTENTION: "attention", GEMM: "gemm"}.get(OPS[piece.op].kind if piece.op in OPS else "", "kernel")
        return Cost(kind, prediction, flops, moved, "", (piece,))

    def of_instruction(self, computation: Computation, instruction: Instruction) -> Cost:
        """Cost of one instruction, an async start counting for the whole pair. Control flow is not costed here."""
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return Cost("free", Prediction(0.0, "none", "free"))
        if kind := collective_kind(self.module, instruction):
            return self._collective(kind, computation, instruction)
        if instruction.base == "copy" and any(shape.host for shape in self._ends(computation, instruction)):
            moved = operand_bytes(computation, instruction)
            return Cost("host_copy", self.latency.host_copy(moved), 0.0, moved, "", instruction.pieces)
        if (call := mosaic_call(self.module, instruction)) is not None:
            return self._mosaic(computation, instruction, call)
        return self._kernel(computation, instruction)

    def _ends(self, computation: Computation, instruction: Instruction) -> tuple:
        sources = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        return instruction.shapes + tuple(shape for source in sources for shape in source.shapes)

    def _collective(self, kind: str, computation: Computation, instruction: Instruction) -> Cost:
        inner = inner_collective(self.module, instruction)
        size = group_size(inner, self.devices)
        whole = operand_bytes(computation, instruction) * (size if kind == "all-gather" else 1)
        prediction = self.latency.collective(kind, whole, size)
        return Cost("collective", prediction, 0.0, whole, kind, instruction.pieces or inner.pieces)

    def _mosaic(self, computation: Computation, instruction: Instruction, call: Instruction) -> Cost:
        pieces = instruction.pieces or call.pieces
        piece = instruction.piece or call.piece
        if (given := self.given(piece, self.mosaic_calls)) is not None:
            return given
        if instruction.opcode == "fusion":
            moved = fusion_bytes(self.module, computation, instruction) - (instruction.bytes if _aliased(call) else 0)
        else:
            moved = operand_bytes(computation, instruction) + (0 if _aliased(call) else instruction.bytes)
        found = self.latency.kernel(0.0, moved)
        if piece and piece.op not in (
            *of_kind(ATTENTION),
            APPEND,
        ):  # the residual's addition and norm: timed as XLA's kernels are
            return Cost("elementwise", found, 0.0, moved, "", pieces)
        kind = "attention" if piece and piece.op in of_kind(ATTENTION) else "kernel"
        prediction = Prediction(found.us, found.bound, "roofline of operand bytes", 0.0, moved)
        if (us := expected_us(call)) is not None:
            prediction = replace(prediction, us=us, source="tuning table of the kernel (targets, not measured)")
        return Cost(kind, prediction, 0.0, moved, "", pieces)

    def _kernel(self, computation: Computation, instruction: Instruction) -> Cost:
        size = None
        if is_library_gemm(instruction) or instruction.opcode == "dot":
            flops = dot_flops(computation, instruction)
            moved = operand_bytes(computation, instruction) + result_bytes(instruction, is_library_gemm(instruction))
            dtype = computation.by_name[instruction.operands[0]].shapes[0].dtype
            size = gemm_size(instruction, flops)
        elif instruction.base in ("fusion", "call", "async"):
            found = list(dots(self.module, instruction))
            flops = sum(dot_flops(inner, dot) for inner, dot in found)
            moved = fusion_bytes(self.module, computation, instruction)
            size = gemm_size(found[0][1], flops) if len(found) == 1 else None
            inner, dot = found[0] if found else (computation, instruction)
            dtype = inner.by_name[dot.operands[0]].shapes[0].dtype if found else "bf16"
        else:
            flops, dtype = 0.0, "bf16"
            moved = operand_bytes(computation, instruction) + instruction.bytes
        if flops:
            pieces = gemm_pieces(self.module, instruction)
            kind = "attention" if pieces and pieces[0].op in of_kind(ATTENTION) else "gemm"
        else:
            kind, pieces = "elementwise", kernel_pieces(self.module, computation, instruction)
        prediction = self.latency.kernel(flops, moved, dtype)
        if size is not None:  # a GEMM that is known by its size, with what is fused to it
            alone = self.latency.gemm(*size, dtype)
            prediction = replace(max(prediction, alone, key=lambda p: p.us), flops=flops, bytes=moved)
        return Cost(kind, prediction, flops, moved, "", pieces)
