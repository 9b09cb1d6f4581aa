"""A complete run through the command line, from text to report, on eight devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.tokenizer import ByteTokenizer
from experiments.quickstart import EXPERIMENTS
from experiments.run import complete_heldout
from tests.experiments.command_line import call, final_row, printed_bits, refusal, tiny_overrides, write_folder
from train.records import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a corpus, one file of which is not text."""
    root = tmp_path_factory.mktemp("place")
    write_folder(root / "corpus")
    (root / "corpus" / "broken.py").write_bytes(b"\xff\xfe\x00broken")
    return root


@pytest.fixture(scope="module")
def finished(place):
    """The output of `train`; the run is runs/mine."""
    from contextlib import redirect_stdout
    from io import StringIO

    from experiments.__main__ import main

    out = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(place)
        assert main(["train", "smoke", "--run", "mine", *tiny_overrides(place)]) == 0
    return out.getvalue()


@pytest.fixture(autouse=True)
def working_directory(place, finished, monkeypatch):
    monkeypatch.chdir(place)


def test_training_ends_with_results_completions_and_a_report(place, finished):
    run = place / "runs" / "mine"
    final = final_row(run)
    figures = final["sets"]["folder"]
    assert final["step"] == 12 and figures["bytes"] > 0 and 0 < figures["bits_per_byte"] < 8
    assert printed_bits(finished) == pytest.approx(figures["bits_per_byte"], abs=1e-4)
    assert {"gzip -9", "xz -9e"} <= set(figures["compressors"]) and all(
        name in finished for name in figures["compressors"]
    )
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    report = (run / "report.html").read_text()
    for sample in samples:
        assert sample["file"] in finished and sample["file"] in report
        assert sample["prompt"] and sample["reference"]
    assert "data:image/png" in report and f"{figures['bits_per_byte']:.3f}"[:4] in report
    assert {"config.json", "environment.json", "metrics.jsonl", "overrides.json", "tokenizer"} <= {
        p.name for p in run.iterdir()
    }
    assert "1 skipped" in finished and "broken.py" in finished


def test_rows_cover_the_run(place):
    rows = read_metrics(place / "runs" / "mine" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [6, 12]
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert {"loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "expert_load"} <= last.keys()


def test_eval_prints_the_bits_per_byte_of_the_final_row(place, capsys):
    code, out, _ = call(capsys, "eval", "mine")
    assert code == 0 and "weights of step 12" in out
    assert printed_bits(out) == pytest.approx(
        final_row(place / "runs" / "mine")["sets"]["folder"]["bits_per_byte"], abs=5e-5
    )


def test_eval_on_another_mesh_gives_the_same_result(place, capsys):
    code, out, _ = call(capsys, "eval", "mine", "--set", "mesh.fsdp=2", "--set", "mesh.data=4")
    assert code == 0
    assert printed_bits(out) == pytest.approx(
        final_row(place / "runs" / "mine")["sets"]["folder"]["bits_per_byte"], abs=1.5e-4
    )
    assert "mesh = (data=-1 x fsdp=3)" in refusal(capsys, "eval", "mine", "--set", "mesh.fsdp=3")


@pytest.mark.unchecked
def test_without_a_long_held_out_file_there_is_nothing_to_complete():
    program = SimpleNamespace(experiment=EXPERIMENTS["smoke"](), mesh=None)
    prepared = SimpleNamespace(tokenizer=ByteTokenizer(), heldout_names=())
    assert complete_heldout(program, None, prepared) == []


def test_eval_refuses_invalid_arguments(capsys):
    assert "stride = 1000" in refusal(capsys, "eval", "mine", "--stride", "1000")
    message = refusal(capsys, "eval", "mine", "--step", "7")
    assert "step 7" in message and "6, 12" in message


def test_streamed_text_equals_the_whole_text(capsys):
    arguments = [
        "generate",
        "mine",
        "--prompt",
        "def function",
        "--max-new-tokens",
        "16",
        "--temperature",
        "0.9",
        "--seed",
        "3",
    ]
    code, whole, _ = call(capsys, *arguments)
    assert code == 0 and whole.startswith("def function") and "tokens, finished by" in whole
    code, streamed, _ = call(capsys, *arguments, "--stream")
    text = whole[: whole.rindex("\n[")]
    assert code == 0 and streamed.rstrip("\n") == text.rstrip("\n")
    assert call(capsys, *arguments)[1] == whole


def test_generate_refuses_invalid_prompts_and_settings(capsys):
    message = refusal(capsys, "generate", "mine", "--prompt", "x = 1\n" * 200, "--max-new-tokens", "16")
    assert "model.max_length = 96" in message and "Shorten" in message
    message = refusal(capsys, "generate", "mine", "--prompt", "x", "--max-new-tokens", "200")
    assert "200" in message and "model.max_length = 96" in message
    assert "top_p" in refusal(capsys, "generate", "mine", "--prompt", "x", "--top-p", "2")
    assert "one --prompt" in refusal(capsys, "generate", "mine", "--prompt", "x", "--prompt", "y", "--stream")


def test_a_tokenizer_of_another_run_is_refused(place, capsys):
    tokenizer = place / "runs" / "mine" / "tokenizer"
    kept = {path: path.read_bytes() for path in tokenizer.iterdir()}
    from data.tokenizer import ByteTokenizer

    try:
        ByteTokenizer().save(tokenizer)
        message = refusal(capsys, "generate", "mine", "--prompt", "x")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert "was trained with tokenizer" in message and "--run NEWNAME" in message


def test_a_finished_run_is_not_trained_again(place, capsys):
    before = (place / "runs" / "mine" / "metrics.jsonl").read_bytes()
    code, out, _ = call(capsys, "train", "smoke", "--run", "mine", *tiny_overrides(place))
    assert code == 0 and "is finished" in out and "--set train.steps=N" in out
    assert (place / "runs" / "mine" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_of_another_config_is_refused(place, capsys):
    message = refusal(capsys, "train", "smoke", "--run", "mine", *tiny_overrides(place), "--set", "train.seed=1")
    assert "train.seed: 0 -> 1" in message


def test_a_deleted_report_can_be_rewritten(place, capsys):
    report = place / "runs" / "mine" / "report.html"
    report.unlink()
    code, out, _ = call(capsys, "report", "mine")
    assert code == 0 and out.strip().endswith("report.html") and report.exists()


def test_more_steps_resume(place, capsys):
    """A run resumed by its name keeps its config. This test is last because it changes the run."""
    assert "is a run of 'smoke'" in refusal(capsys, "train", "quickstart", "--resume", "mine")
    code, out, _ = call(capsys, "train", "smoke", "--resume", "mine", "--set", "train.steps=16")
    assert code == 0 and "resuming from step 12" in out and "train.steps: 12 -> 16" in out
    assert final_row(place / "runs" / "mine")["step"] == 16
    rows = read_metrics(place / "runs" / "mine" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "final"] == [16]


@pytest.mark.slow
def test_sigterm_from_a_shell_saves_exits_cleanly_and_resumes(place, tmp_path):
    """SIGTERM in mid-run gives exit code 143, and the same command then ends with the results of an undisturbed run."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}

    def command(run: Path) -> list[str]:
        settings = [
            *tiny_overrides(place),
            "--set",
            "train.steps=400",
            "--set",
            "train.log_every=1",
            "--set",
            "samples.count=0",
        ]
        return [sys.executable, "-m", "experiments", "train", "smoke", "--run", str(run), *settings]

    def start(run: Path) -> subprocess.Popen:
        return subprocess.Popen(
            command(run), cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    one, two = tmp_path / "one", tmp_path / "two"
    outputs = start(one).communicate(timeout=300)
    process = start(two)
    metrics = two / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count('"kind": "train"') > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopped at step" in output, output
    assert "Traceback" not in output and start(two).communicate(timeout=300) is not None
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
        for run in (one, two)
    ]
    assert len(losses[0]) == 400 and losses[0] == losses[1], outputs
    assert final_row(one)["sets"] == final_row(two)["sets"]
