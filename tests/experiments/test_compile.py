"""Ahead-of-time compilation for pods: named experiments match their papers, reports are parsed, misuse is refused."""

import io
import json

import pytest
from rich.console import Console

from experiments.compile import AVAILABLE, Compiled, Memory, _largest, _refusal, print_compiled, save
from experiments.pods import PODS
from experiments.resolve import resolve
from model.cost import count_parameters
from pallas_kernels.ahead_of_time import TOPOLOGIES, devices_of
from sharding.collectives import Collective, Traffic
from tests.experiments.command_line import call, refusal

REPORT = """Memory Space: default (color=0)
Total bytes: 1469023680 (1.37GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  250.00MiB( 13%);  250.00MiB;     50855936;                4; bf16[1,512,2048], f32[2048,32000]
    1.12GiB( 61%);  125.00MiB;    312999936;                1; bf16[2048,32000]
Memory Space: vmem (color=1)
  128.00MiB( 13%);  128.00MiB;     50855936;                4; bf16[512,2048]
"""


def test_mixtral_has_as_many_parameters_as_published():
    assert count_parameters(PODS["mixtral_8x7b"]().model).total == 46_702_792_704


@pytest.mark.parametrize(
    ("name", "devices"), [("mixtral_8x7b", 64), ("deepseek_v3_like", 64), ("deepseek_v3_like_full", 512)]
)
def test_the_pods_fit_their_meshes_and_two_sequences_a_chip(name, devices):
    experiment = resolve(name, [], devices, platform="tpu")
    assert experiment.data.batch_size == 2 * devices and experiment.data.sequence_length == 4096
    assert experiment.model.remat == "full" and experiment.optimizer.name == "adamw"
    assert f"compile {name} " in PODS[name].__doc__


def test_the_largest_buffers_are_those_of_the_devices_memory():
    assert _largest(REPORT) == ("250.00MiB: bf16[1,512,2048], f32[2048,32000]", "125.00MiB: bf16[2048,32000]")
    assert _largest("") == ()


def test_memory_updated_in_place_counts_once():
    # An array that is updated in place is an argument and a result, but counts once.
    assert Memory(arguments=100, in_place=90, results=95, temporaries=40, code=1).total == 146


def test_a_compiler_error_becomes_one_paragraph():
    message = (
        "E1000: CompileTimeHbmOom: Ran out of memory on HBM, 512.00G exceeds available HBM (15.75G). "
        "HLO module: x\n\nLargest:\n"
    )
    text = _refusal(message, "v5e:2x2")
    assert (
        "exceeds available HBM (15.75G)." in text
        and "HLO module" not in text
        and "train.microbatches" in text
        and "\n" not in text
    )


def test_figures_are_printed_and_saved(tmp_path):
    collectives = (
        Collective("all-gather", 10_000_000, 8, 32, "up"),
        Collective("reduce-scatter", 1_000_000, 8, 32, "up"),
    )
    traffic = Traffic(collectives, 400_000_000, 1, 7_000_000)
    compiled = Compiled(
        "v5e:2x2",
        "TPU v5 lite",
        4,
        {"fsdp": 4},
        1_000_000,
        4096,
        Memory(20_000_000_000, 0, 0, 0, 0),
        AVAILABLE["TPU v5 lite"],
        ("1GiB: f32[2]",),
        traffic,
        1e12,
        197e12,
        "peak",
        3.0,
    )
    out = io.StringIO()
    print_compiled(compiled, Console(file=out, width=160))
    shown = " ".join(out.getvalue().split())
    assert "all-gather 32 0.32 GB 0.28 GB" in shown and "reduce-scatter 32 0.03 GB 0.22 GB" in shown
    assert "total 20.00 GB" in shown and "output is 0.40 GB" in shown
    assert "one iteration of each outputs 7.00 MB" in shown
    experiment = resolve("smoke", [], 4)
    save(compiled, experiment, ["a=1"], tmp_path / "deep" / "figures.json")
    saved = json.loads((tmp_path / "deep" / "figures.json").read_text())
    assert saved["experiment"] == "smoke" and saved["memory"]["total"] == 20_000_000_000
    assert saved["collectives"]["all-gather"] == {"count": 32, "output_bytes": 320_000_000, "bytes_sent": 280_000_000}


def test_misuse_is_refused_before_anything_is_compiled(capsys):
    unknown = refusal(capsys, "compile", "smoke", "--topology", "v9:2x2")
    assert "v9:2x2" in unknown and TOPOLOGIES["v5e"] in unknown
    mesh = refusal(capsys, "compile", "mixtral_8x7b", "--topology", "v5e:2x2")
    assert "expert=8" in mesh and "there are 4" in mesh and "cpu" not in mesh
    assert "quickstart" in refusal(capsys, "compile", "quickstat", "--topology", "v5e:2x2")


def test_a_missing_compiler_is_named_with_its_package(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    assert "pip install libtpu" in refusal(capsys, "compile", "smoke", "--topology", "v5e:2x2")


def test_every_generation_has_its_memory_in_the_table():
    assert {devices_of(topology)[0].device_kind for topology in TOPOLOGIES.values()} == set(AVAILABLE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache:UserWarning")
def test_a_step_compiles_without_a_tpu(capsys, tmp_path):
    saved = tmp_path / "smoke.json"
    code, out, _ = call(
        capsys,
        "compile",
        "smoke",
        "--topology",
        "v5e:2x2",
        "--set",
        "model.remat=full",
        "--set",
        "mesh.data=1",
        "--set",
        "mesh.fsdp=-1",
        "--save",
        saved,
    )
    figures = json.loads(saved.read_text())
    assert code == 0 and "fits" in out and figures["devices"] == 4 and figures["mesh"] == {"fsdp": 4}
    memory = figures["memory"]
    # Three float32 copies of the weights, nearly all sharded over four devices and updated in place.
    assert figures["parameters"] * 3 < memory["arguments"] < figures["parameters"] * 12
    assert memory["in_place"] > 0.9 * memory["results"]
    assert set(figures["collectives"]) >= {"all-gather", "all-reduce"} and figures["bytes_sent"] > 0
