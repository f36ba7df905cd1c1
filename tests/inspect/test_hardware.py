"""Hardware files: strict reading, the calibration's own measurements, and a compile for each GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import ConfigError, config_path
from nanoflow_jax.cost.latency import RooflineModel, optimal_tokens_per_second, wire_bytes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect import gpu_target

GPUS = ("a100_sxm_80", "h100_sxm", "h200", "b200")
MIB = 2**20


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_plausible(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware.node_size == 8
    # XLA's matrix_unit_description, another source than the data sheets': 4 units per SM, FMA per clock, GHz.
    fma, clock = {8: (256, 1.41e9), 9: (512, 1.8295e9), 10: (1024, 1.8353e9)}[hardware.capability[0]]
    assert hardware.bf16_flops == pytest.approx(hardware.sm_count * 4 * fma * 2 * clock, rel=0.02)
    assert hardware.fp8_flops == (0 if name.startswith("a100") else pytest.approx(2 * hardware.bf16_flops, rel=1e-3))
    assert hardware.nvlink_bandwidth == pytest.approx(
        hardware.nvlink_links * (50e9 if name == "b200" else 25e9), rel=1e-6
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sm_count = 132", "h.toml: missing field 'sm_count'"),
        ("node_size = 8", "h.toml: missing field 'node_size'"),
        ("gemm_efficiency = 0.797", "h.toml: missing field calibration.'gemm_efficiency'"),
    ],
)
def test_a_missing_field_is_named(tmp_path: Path, line: str, said: str) -> None:
    text = config_path("hardware", "h200").read_text()
    name = line.split(" ")[0]
    kept = [row for row in text.splitlines() if not row.startswith(name)]
    assert len(kept) == len(text.splitlines()) - 1
    (tmp_path / "h.toml").write_text("\n".join(kept))
    with pytest.raises(ConfigError, match="^" + said) as error:
        load_hardware(tmp_path / "h.toml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("node_size = 8", "node_size = 8.5", "h.toml: node_size: 8.5 is not accepted; expected a whole number above 0"),
        ("node_size = 8", "node_size = true", "h.toml: node_size: True is not accepted"),
        ("node_size = 8", "node_size = 8\nnode_sise = 8", "h.toml: unknown field 'node_sise'; accepted: "),
        ("gemm_efficiency = 0.797", "gemm_efficiency = 1.2", "gemm_efficiency: 1.2 is not accepted; .* at most 1"),
        ("gemm_efficiency = 0.797", "gemm_efficiency = 0", "gemm_efficiency: 0 is not accepted"),
        ("bf16_flops = 989e12", "bf16_flops = -1.0", "bf16_flops: -1.0 is not accepted; expected a number above 0"),
        ('"9.0"', '"nine"', "compute_capability: 'nine' is not accepted; expected a text like \"9.0\""),
        ("[calibration]", "[calibrated]", r"missing table \[calibration\]"),
        ("node_size = 8", "node_size =", "not a TOML file"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = config_path("hardware", "h200").read_text()
    assert old in text
    (tmp_path / "h.toml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=said) as error:
        load_hardware(tmp_path / "h.toml")
    assert "\n" not in str(error.value)


def test_an_own_file_and_an_unknown_name(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text(config_path("hardware", "h200").read_text())
    assert load_hardware(own) == replace(load_hardware("h200"), name="mine")
    with pytest.raises(ConfigError, match="h200"):
        load_hardware("h300")


def test_the_latency_model_returns_what_it_was_calibrated_on() -> None:
    a100, h200 = load_hardware("a100_sxm_80"), load_hardware("h200")
    assert RooflineModel(a100).collective("all-gather", 32 * MIB, 8).us == pytest.approx(221, rel=0.01)
    assert RooflineModel(a100).collective("all-gather", 2 * MIB, 8).us == pytest.approx(30, rel=0.01)
    assert optimal_tokens_per_second(a100, 70e9, calibrated=True) == pytest.approx(1857, rel=0.005)
    square = RooflineModel(h200).gemm(8192, 8192, 8192)
    assert square.bound == "compute"
    assert square.source == "roofline"
    assert 2 * 8192**3 / (square.us - h200.calibration.kernel_latency_us) * 1e6 == pytest.approx(788e12, rel=0.01)
    copy = RooflineModel(h200).kernel(0, 8e9)
    assert copy.bound == "memory"
    assert 8e9 / copy.us * 1e6 == pytest.approx(4.3e12, rel=0.01)


def test_an_all_reduce_moves_what_a_reduce_scatter_and_an_all_gather_move() -> None:
    parts = wire_bytes("reduce-scatter", 800, 8) + wire_bytes("all-gather", 800, 8)
    assert wire_bytes("all-reduce", 800, 8) == parts == 1400
    assert RooflineModel(load_hardware("h200")).collective("all-reduce", 800, 1).us == 0
    with pytest.raises(ConfigError, match="all-everything"):
        wire_bytes("all-everything", 1, 8)


def test_too_many_devices_and_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="devices: 9 is not accepted; a node of h200 has 1 to 8"):
        gpu_target.gpu_mesh(load_hardware("h200"), 9)
    monkeypatch.setattr(gpu_target, "PLUGINS", ("no_such_package.plugin", "no_such_module"))
    with pytest.raises(ConfigError, match="needs the CUDA plugin: pip install "):
        gpu_target.gpu_mesh(load_hardware("h200"), 8)


@pytest.mark.aot
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_compiles_collectives(name: str) -> None:
    mesh = gpu_target.gpu_mesh(load_hardware(name), 8)
    assert mesh.axis_names == ("tp",)
    assert mesh.size == 8

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        full = jax.lax.all_gather(x, "tp", axis=0, tiled=True)
        return jax.lax.psum_scatter(jax.lax.psum(full @ w, "tp"), "tp", tiled=True)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P("tp"), check_vma=False)
    shapes = ((512, 256), P("tp")), ((256, 128), P())
    avals = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in shapes]
    text = jax.jit(mapped).lower(*avals).compile().as_text()
    assert text is not None
    assert all(f" {op}" in text for op in ("all-gather", "all-reduce", "reduce-scatter"))


@pytest.mark.aot
@pytest.mark.parametrize("first", ["", "jax.devices()"], ids=["fresh", "after jax started"])
def test_nobody_sees_the_cudnn_error(first: str) -> None:
    """Without JAX_PLATFORMS and without a GPU. Where JAX started before, its own complaint came then; ours must
    still work."""
    program = "\n".join(
        [
            "import jax",
            "jax.config.update('jax_platforms', 'cpu')" if first else "",
            first,
            "jax.config.update('jax_platforms', None)" if first else "",
            "from nanoflow_jax.hardware import load_hardware",
            "from nanoflow_jax.inspect.gpu_target import gpu_mesh",
            "print(gpu_mesh(load_hardware('h200'), 8).size)",
        ]
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "8", done.stderr
    assert "cuDNN" not in done.stderr
