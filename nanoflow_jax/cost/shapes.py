"""The local shapes of a model on a mesh, and what each op of a layer costs by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from kernels_pallas.targets import mosaic_supported
from nanoflow_jax.config import Experts, ModelConfig
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import LatencyModel, Prediction, optimal_tokens_per_second
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.models.layout import kv_groups, padded_vocab
from nanoflow_jax.step.attention import adds_products, gated_in_one, rows_fit

SHARED = " shared"  # in the names of GEMMs
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HLO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "bf16", "fp8": "f8e4m3fn"}  # float16 runs in bfloat16


def optimum(config: ModelConfig, hardware: Hardware, calibrated: bool = False) -> float:
    """Tokens per second and GPU: `optimal_tokens_per_second` of the model's GEMMs; of experts, those that a token is
    sent to."""
    return optimal_tokens_per_second(hardware, config.active_params, calibrated, fp8=config.quantization == "fp8")


@dataclass(frozen=True)
class Shapes:
    """Sizes on one of `devices` GPUs, in elements; element_bytes and dtype of activations and head, weight_dtype of the
    layers' weights, page_bytes of an element of the pages; qk_norm, norms and experts as the model has them. windows
    and routed say of a period of the layers what each has."""

    hidden: int
    width: int  # of all query heads together, on all devices
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # of the MLP of layers without experts; 0: there are none
    shared: int  # of the MLP that every token goes through beside experts; 0: there is none
    vocab: int
    devices: int
    element_bytes: int
    page_bytes: int
    dtype: str
    weight_dtype: str
    qk_norm: str | None
    norms: str
    experts: Experts | None = None
    rows_kernel: bool = False  # where Mosaic is: what an fp8 GEMM reads is rounded by the kernel for it
    gated_in_one: bool = False  # which makes what D reads of what UG gives
    adds_products: bool = False  # the residual's addition multiplies what fp8 O and D give by their scales
    windows: tuple[int | None, ...] = (None,)
    routed: tuple[bool, ...] = (False,)  # to experts

    @staticmethod
    def of(config: ModelConfig, devices: int, page_bytes: int | None = None) -> Shapes:
        """page_bytes None: as the activations."""
        experts = config.experts
        routed = tuple(layer.mlp.experts is not None for layer in config.pattern)
        return Shapes(
            hidden=config.hidden_size,
            width=config.num_heads * config.head_dim,
            q_heads=config.num_heads // devices,
            kv_heads=kv_groups(config, devices) // devices,
            head_dim=config.head_dim,
            ffn=0 if all(routed) else config.intermediate_size // devices,
            shared=0 if experts is None else experts.shared // devices,
            vocab=padded_vocab(config, devices) // devices,
            devices=devices,
            element_bytes=BYTES[config.dtype],
            page_bytes=page_bytes or BYTES[config.dtype],
            dtype=HLO_NAMES[config.dtype],
            weight_dtype=HLO_NAMES[config.quantization or config.dtype],
            qk_norm=config.qk_norm,
            norms=config.norms,
            experts=experts,
            windows=tuple(layer.attention.window for layer in config.pattern),
            routed=routed,
            rows_kernel=rows_fit(config, devices),
            adds_products=adds_products(config, devices),
            gated_in_one=all(gated_in_one(config, layer.mlp) for layer in config.pattern),
        )

    @property
    def routed_share(self) -> float:
        """Of the layers, that of those with experts."""
        return sum(self.routed) / len(self.routed)

    @property
    def gemms(self) -> dict[str, tuple[int, int]]:
        """(n, k) of the GEMMs: the weights `[n, k]` on one device. O over N is that of gather, over K of the others;
        SHARED those of the MLP beside experts."""
        return {
            "KQV": ((self.q_heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "O over N": (self.hidden // self.devices, self.width),
            "O over K": (self.hidden, self.width // self.devices),
            **self._mlp("", self.ffn),
            **self._mlp(SHARED, self.shared),
            **({"ROUTE": (self.experts.count, self.hidden)} if self.experts else {}),
            "HEAD": (self.vocab, self.hidden),
        }

    def expert_gemms(self, whole: bool) -> dict[str, tuple[int, int, int, int]]:
        """(experts, n, k, parts) of the grouped GEMMs: the weights `[experts, parts, n, k]` on one device. whole: each
        expert is on one."""
        experts = self._experts
        count, size = experts.count // (self.devices if whole else 1), experts.size // (1 if whole else self.devices)
        return {"UG": (count, size, self.hidden, 2), "D": (count, self.hidden, size, 1)}

    def room(self, whole: bool) -> int:
        """Places for rows on a device, for each that is taken on average."""
        experts, spread = self._experts, self.devices if whole else 1
        return -(-min(experts.per_token, experts.count // spread) * spread // experts.per_token)

    @property
    def _experts(self) -> Experts:
        assert self.experts is not None
        return self.experts

    def _mlp(self, name: str, size: int) -> dict[str, tuple[int, int]]:
        return {f"UG{name}": (2 * size, self.hidden), f"D{name}": (self.hidden, size)} if size else {}


@dataclass(frozen=True)
class OpCosts:
    """Each op of a step on `rows` rows, alone on the GPU, by one latency model.

    imbalance  rows of the device that has most, over the mean, where experts are split by their number

    Attention's costs are those of a layer, or the mean of all.
    """

    model: LatencyModel
    shapes: Shapes
    load: StepLoad
    imbalance: float = 1.0

    def gemm(self, name: str, rows: int) -> Prediction:
        """name: of `Shapes.gemms`."""
        dtype = self.shapes.dtype if name in ("HEAD", "ROUTE") else self.shapes.weight_dtype
        return self.model.gemm(rows, *self.shapes.gemms[name], dtype)

    @property
    def quantised(self) -> bool:
        """The layers' GEMMs are in fp8."""
        return self.shapes.weight_dtype.startswith("f8")

    def quantise(self, name: str, rows: int, one_pass: bool = False) -> Prediction:
        """What a GEMM reads, per row: its largest magnitude, then its values over that, in one byte. one_pass: by the
        kernel that reads it once."""
        _, k = self.shapes.gemms[name]
        return self._elementwise(((1 if one_pass else 2) + 1 / self.shapes.element_bytes) * rows * k)

    def silu_quantised(self, rows: int) -> Prediction:
        """Where one kernel does both."""
        return self._elementwise((2 + 1 / self.shapes.element_bytes) * rows * self.shapes.ffn)

    def cut(self, rows: int) -> Prediction:
        """Some rows of a quantised norm are copied."""
        return self._elementwise(2 / self.shapes.element_bytes * rows * self.shapes.hidden)

    def join(self, rows: int) -> Prediction:
        """Heads that were gathered in fp8 are read, and written side by side."""
        return self._elementwise(2 / self.shapes.element_bytes * rows * self.shapes.width)

    def scale(self, name: str, rows: int) -> Prediction:
        """What an fp8 GEMM gives, times the scales of row and column."""
        n, _ = self.shapes.gemms[name]
        return self._elementwise(2 * rows * n)

    def rope(self, rows: int) -> Prediction:
        """Queries and keys are read and written."""
        s = self.shapes
        return self._elementwise(2 * rows * (s.q_heads + s.kv_heads) * s.head_dim)

    def squares(self, rows: int) -> Prediction:
        """Of norms of queries and keys: those of KQV's result are summed."""
        s = self.shapes
        return self._elementwise(rows * (s.q_heads + 2 * s.kv_heads) * s.head_dim)

    def squares_reduction(self, rows: int) -> Prediction:
        """Of whole projections: two sums per row, over all devices."""
        return self.model.collective("all-reduce", rows * 2 * 4, self.shapes.devices)

    def append(self, rows: int) -> Prediction:
        s = self.shapes
        return self.model.append(rows, s.kv_heads, s.head_dim, kv_bytes=(s.element_bytes + s.page_bytes) / 2)

    def decode_attention(self, rows: int, sms: int | None = None, layer: int | None = None) -> Prediction:
        s = self.shapes
        return self._mean(
            self.load.decode_context,
            layer,
            lambda context: self.model.decode_attention(
                rows, context, s.q_heads, s.kv_heads, s.head_dim, kv_bytes=s.page_bytes, sms=sms
            ),
        )

    def prefill_attention(self, rows: int, layer: int | None = None) -> Prediction:
        s = self.shapes
        return self._mean(
            self.load.prefill_context,
            layer,
            lambda context: self.model.prefill_attention(
                rows, context, s.q_heads, s.kv_heads, s.head_dim, kv_bytes=s.page_bytes
            ),
        )

    def _mean(self, context: float, layer: int | None, cost: Callable[[float], Prediction]) -> Prediction:
        """Of a mean context, no window sees more than its own size; None: over all layers."""
        windows = self.shapes.windows
        windows = windows if layer is None else (windows[layer % len(windows)],)
        counts = Counter(context if window is None else min(context, window) for window in windows)
        found = [(cost(seen), count / len(windows)) for seen, count in counts.items()]
        first, _ = found[0]
        means = {name: sum(getattr(one, name) * share for one, share in found) for name in ("us", "flops", "bytes")}
        return first if len(found) == 1 else replace(first, **means)

    def routed(self, rows: int, whole: bool) -> float:
        """Rows that experts of the busiest device get. whole: each expert is on one device."""
        experts, devices = self._experts, self.shapes.devices
        share = self.imbalance / devices if whole and devices > 1 else 1.0
        return rows * min(experts.per_token * share, experts.count / (devices if whole else 1))

    @property
    def _experts(self) -> Experts:
        assert self.shapes.experts is not None
        return self.shapes.experts

    def grouped(self, name: str, rows: int, whole: bool) -> Prediction:
        """UG or D of the experts. Where there is no kernel for it, every row is multiplied with every expert, whichever
        device has most."""
        s = self.shapes
        found = (self if self.grouped_kernels else replace(self, imbalance=1.0)).routed(rows, whole)
        return self.model.grouped_gemm(found, *s.expert_gemms(whole)[name], room=s.room(whole), dtype=s.weight_dtype)

    def router(self, rows: int) -> Prediction:
        return self.gemm("ROUTE", rows)

    def places(self, rows: int, whole: bool) -> tuple[Prediction, ...]:
        """Softmax and choice; ranks of the choices within their experts; places and weights: as XLA makes them."""
        experts = self._experts
        local = experts.count // (self.shapes.devices if whole else 1)
        scores, choices = rows * experts.count * 4.0, rows * experts.per_token * 4.0
        moved = (2 * scores, 3 * scores, *[choices * local] * 4, *[2 * choices] * 4)
        return tuple(self.model.kernel(0.0, one) for one in moved)

    @property
    def grouped_kernels(self) -> bool:
        """The GPU has a kernel for grouped GEMMs."""
        return mosaic_supported(self.model.hardware.capability, "grouped_gemm")

    def tiles(self) -> Prediction:
        """One of two small kernels that list the tiles of the grouped GEMMs."""
        return self.model.kernel(0.0, 0.0)

    def dispatch(self, rows: int, whole: bool) -> Prediction:
        s = self.shapes
        return self.model.gather(self.routed(rows, whole), s.hidden, room=s.room(whole), element_bytes=s.element_bytes)

    def combine(self, rows: int, whole: bool) -> Prediction:
        s, choices = self.shapes, self._experts.per_token
        here, spread = self.routed(rows, whole), s.devices if whole else 1
        return self.model.combine(rows, here, s.hidden, choices, spread, element_bytes=s.element_bytes)

    def transpose(self, rows: int) -> Prediction:
        """Attention output is turned before GEMV.AG."""
        return self._elementwise(2 * rows * self.shapes.q_heads * self.shapes.head_dim)

    def silu(self, name: str, rows: int) -> Prediction:
        """Two halves of what UG gives are read, their product is written; name: of `Shapes.gemms`."""
        return self._elementwise(1.5 * rows * self.shapes.gemms[name][0])

    def norm(self, rows: int) -> Prediction:
        return self.model.norm(rows, self.shapes.hidden, element_bytes=self.shapes.element_bytes)

    def norm_quantised(self, rows: int) -> Prediction:
        """Where one kernel does both: the normed sum is written in one byte."""
        return self._elementwise((3 + 1 / self.shapes.element_bytes) * rows * self.shapes.hidden)

    def embed(self, rows: int) -> Prediction:
        """Rows of the table are read, and written."""
        return self._elementwise(2 * rows * self.shapes.hidden)

    def sampling(self) -> Prediction:
        return self.model.sampling(self.sampled_rows, self.shapes.vocab)

    def collective(self, kind: str, whole_bytes: float) -> Prediction:
        return self.model.collective(kind, whole_bytes, self.shapes.devices)

    def reduction(self) -> Prediction:
        """One of sampling's, of one number per sampled row."""
        return self.model.collective("all-reduce", self.sampled_rows * 4, self.shapes.devices)

    @property
    def sampled_rows(self) -> int:
        """One per decode row, and one per chunk of a prompt; a prompt is about twice its mean context."""
        load = self.load
        chunks = max(1, round(load.prefill_rows / max(2 * load.prefill_context, 1))) if load.prefill_rows else 0
        return load.decode_rows + chunks

    def _elementwise(self, elements: float) -> Prediction:
        return self.model.kernel(0.0, elements * self.shapes.element_bytes)
