"""The command line with odd arguments, foreign folders, signals and hidden accelerators; its tables and last lines."""

from __future__ import annotations

import gc
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from experiments.__main__ import COMMANDS, DESCRIPTION, EPILOGUE, main
from experiments.backend import backend_lines, describe_backend
from experiments.command_help import make_parser
from experiments.differences import differing, differing_json, written
from experiments.launch.supervise import NEVER_AGAIN
from experiments.next_steps import next_steps
from experiments.quickstart import quickstart
from experiments.report import write_report
from experiments.resolve import find_run, is_run, new_local_run_path, new_run_path, resolve
from experiments.stopping import Stopped, stopped_by_sigterm
from experiments.terminal import Column, Line, print_table
from tests.experiments.command_line import call, refusal, tiny_overrides, write_folder
from tests.fake_bucket import use_fake_bucket
from train.config_io import apply_overrides, to_dict
from train.device_check import EXIT_WRONG_DEVICE, DeviceError
from train.records import MetricsWriter, RunFolder, RunFolderError, open_run
from train.signals import StopSignal

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# ---- folders that --run may write ----


def test_a_run_is_a_name_below_runs_or_a_path(tmp_path):
    assert new_run_path("mine") == Path("runs/mine") and new_run_path("größe 2=3") == Path("runs/größe 2=3")
    assert new_run_path("./mine") == Path("mine") and new_run_path("../x/y") == Path("../x/y")
    (tmp_path / "new").mkdir()
    assert new_run_path("new/") == Path("new") and new_run_path(str(tmp_path / "new")) == tmp_path / "new"


@pytest.mark.parametrize("name", [".", "..", "./", "../..", "work", "./work", "file", "./file"])
def test_a_folder_with_other_files_is_refused(tmp_path, monkeypatch, name):
    deep = tmp_path / "a" / "b"
    for folder in (tmp_path, tmp_path / "a", deep, deep / "work", deep / "runs/work"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "notes.txt").write_text("a stranger's")
    (deep / "file").write_text("")
    (deep / "runs/file").write_text("")
    monkeypatch.chdir(deep)
    with pytest.raises(RunFolderError, match=r"holds other files .* is not a run; name a run below runs/"):
        new_run_path(name)


def test_a_run_and_what_a_killed_start_leaves_may_be_continued(tmp_path):
    with open_run(tmp_path / "runs" / "mine", resolve("smoke", [], 8)):
        pass
    assert new_run_path("mine") == Path("runs/mine") and new_run_path("runs/mine") == Path("runs/mine")
    started = RunFolder(tmp_path / "runs" / "killed")
    started.checkpoints.mkdir(parents=True)
    assert new_run_path("killed") == Path("runs/killed")
    started.lock.write_text("")
    assert new_run_path("killed") == Path("runs/killed")
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"config\.json"):
        new_run_path("./published")


@pytest.mark.parametrize("name", ["", "x" * 300, "a\nb", "a\x00b", "a\\b", "./" + "x" * 300])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(RunFolderError) as refused:
        new_run_path(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_run_of_an_object_store_is_never_a_local_folder(capsys):
    message = refusal(capsys, "train", "smoke", "--run", "s3://bucket/x")
    assert "--run = 's3://bucket/x'" in message and "gs://" in message
    assert not Path("s3:").exists()


def test_a_run_in_a_bucket_is_found_and_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_fake_bucket()
    text = f"gs://bucket/{tmp_path.name}/runs/a"
    assert not is_run(text) and str(new_run_path(text)) == text
    with open_run(text, resolve("smoke", ["data.tokenizer.kind=byte"], 1)), MetricsWriter(RunFolder(text)) as metrics:
        metrics.write({"kind": "train", "step": 1, "loss": 1.0})
    assert str(find_run(text).path) == text and str(new_run_path(text)) == text
    assert str(write_report(text, themes=())) == f"{text}/report.html"
    assert b"smoke" in (find_run(text).report).read_bytes() and not list(tmp_path.iterdir())
    with pytest.raises(RunFolderError, match="a local folder"):
        new_local_run_path(text)
    parent = RunFolder(f"gs://bucket/{tmp_path.name}/published")
    parent.config.write_text("{}")
    with pytest.raises(RunFolderError, match=r"holds other files \(config\.json\)"):
        new_run_path(str(parent.path))
    with pytest.raises(RunFolderError, match="is a published model"):
        find_run(str(parent.path))


@pytest.mark.parametrize("command", ["eval", "report", "export", "train", "upcycle"])
def test_a_run_name_of_300_letters_is_a_clear_error(capsys, command):
    more = {"export": ["--to", "out"], "upcycle": ["--run", "new"]}.get(command, [])
    message = refusal(capsys, command, "x" * 300, *more)
    assert "xxx" in message and len(message) < 1500


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "x", "--step", "٣"], "digits 0 to 9"),
        (["eval", "x", "--step", "1" * 30], "not between 0 and 2147483647"),
        (["eval", "x", "--step", "1" * 5000], "not a whole number"),
        (["eval", "x", "--stride", "0"], "not between 1"),
        (["generate", "x", "--prompt", "y", "--seed", str(2**32)], "not between 0 and 4294967295"),
        (["generate", "x", "--prompt", "y", "--max-new-tokens", "9" * 20], "not between 1"),
        (["generate", "x", "--prompt", "y", "--temperature", "nan"], "not a number"),
        (["generate", "x", "--prompt", "y", "--top-p", "٠.٥"], "not a number"),
        (["show", "smoke", "--devices", "0"], "not between 1"),
    ],
)
def test_numbers_out_of_range_or_in_other_digits_are_refused(capsys, arguments, expected):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "x", "--prompt", "ab\udcff"], "--prompt"),
        (["generate", "x", "--prompt", "a", "--chat", "--system", "ab\udcff"], "--system"),
        (["train", "smoke", "--set", "data.sources.0.path=ab\udcff"], "--set"),
        (["train", "smoke", "--run", "ab\udcff"], "--run"),
        (["train", "ab\udcff"], "train"),
    ],
)
def test_text_that_is_not_utf8_is_refused(capsys, arguments, option):
    message = refusal(capsys, *arguments)
    assert f"{option}: the text is not UTF-8 (byte 0xff after" in message and "ab" in message


def test_system_requires_chat(capsys):
    assert "--system requires --chat" in refusal(capsys, "generate", "x", "--prompt", "y", "--system", "z")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "JAX_COORDINATOR_ADDRESS (host:port of process 0; it is unset)"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = two"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "(it is 2)"),
    ],
)
def test_distributed_without_its_variables_is_a_clear_error(variables, expected):
    """Each in a process, which exits at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "smoke", "--distributed"],
        cwd=ROOT, env=kept | {"JAX_PLATFORMS": "cpu"} | variables, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and expected in done.stderr, done.stderr


@pytest.mark.parametrize(
    "topology",
    ["v5p:0x0x0", "v5e:0x4", "v5p:-1x2x2", "v5p:999999x999999x999999", "v5p:4", "v5p", "", "v5p:" + "9" * 5000],
)
def test_a_topology_of_impossible_sizes_is_refused(capsys, topology):
    message = refusal(capsys, "compile", "smoke", "--topology", topology)
    assert "topology" in message and "v5e:2x2" in message


# ---- show ----


def test_show_prints_what_differs_from_the_defaults_unless_asked_for_all(capsys):
    code, short, _ = call(capsys, "show", "smoke", "--devices", "1")
    assert code == 0 and re.search(r"data\.batch_size\s+8", short) and "--all prints every field" in short
    assert "model.dropout" not in short and re.search(r"model\.moe\.num_experts\s+4", short)
    code, long, _ = call(capsys, "show", "smoke", "--devices", "1", "--all")
    assert code == 0 and re.search(r"model\.dropout\s+0\.0", long) and "--all" not in long


def test_a_part_that_equals_its_defaults_is_named():
    experiment = resolve("smoke", ["model.moe=none"], 1)
    assert not any(name.startswith("model.moe") for name in differing(experiment))
    experiment = resolve("quickstart", [], 1)
    assert differing(experiment)["model.moe"].value == experiment.model.moe  # 8 experts, top-2, as MoEConfig() has it
    assert "model.moe.top_k" in differing(resolve("quickstart", ["model.moe.top_k=3"], 1))


@given(st.integers(1, 9), st.floats(0, 1), st.booleans(), st.sampled_from(["adamw", "lion"]))
def test_a_written_difference_is_an_override_that_makes_it(top_k, rate, tied, name):
    values = {"model.moe.top_k": top_k, "optimizer.weight_decay": rate, "model.tied_embeddings": tied,
              "optimizer.name": name, "optimizer.betas": (rate / 2, 0.5)}  # fmt: skip
    base = quickstart()
    experiment = apply_overrides(base, [f"{field}={written(value)}" for field, value in values.items()])
    found = {field: each for field, each in differing(experiment).items() if field in values}
    assert all(each.value == values[field] for field, each in found.items())
    again = apply_overrides(base, [f"{field}={written(each.value)}" for field, each in found.items()])
    assert {field: each.value for field, each in differing(again).items() if field in found} == {
        field: each.value for field, each in found.items()
    }
    assert differing_json(to_dict(experiment)) == differing(experiment)


def test_values_are_written_as_the_help_and_the_errors_write_them():
    values = (None, True, 0.1, (0.9, 0.95), (), "", "adamw", quickstart().model.moe)
    assert [written(value) for value in values] == [
        "none", "true", "0.1", "0.9,0.95", "()", '""', "adamw", "MoEConfig with its defaults",
    ]  # fmt: skip


# ---- tables ----


cells = st.text(st.characters(codec="ascii", exclude_categories=("Cc", "Cs")), max_size=40)


@settings(max_examples=25)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=4))
def test_a_pipe_gets_every_row_whole_on_one_line(rows):
    out = StringIO()
    console = Console(file=out, highlight=False, emoji=False, markup=False, width=20)
    print_table(console, (Column("a"), Column("b", fold=True, drop=1)), [Line(row, style="bold") for row in rows])
    lines = out.getvalue().split("\n")
    assert len(lines) == len(rows) + 2 and not any(line.endswith(" ") for line in lines)
    for line, (first, second) in zip(lines[1:], rows, strict=False):
        assert first.rstrip() in line and line.endswith(second.rstrip())


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_gets_the_columns_that_fit_and_the_names_of_the_others(width):
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=width, highlight=False, emoji=False, markup=False)
    columns = (Column("first"), Column("second", drop=1), Column("third", fold=True))
    print_table(console, columns, [Line(("a" * 40, "b" * 40, "word " * 12))])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert all(len(line) <= width for line in plain.splitlines()) and "a" * 40 in plain
    assert ("b" * 40 in plain) == (width == 160) and ("also shows second" in plain) == (width == 80)


# ---- the end of a run ----


@pytest.mark.parametrize(
    ("name", "overrides", "first"),
    [
        ("quickstart", [], "generate mine --prompt 'def fib(n):' --stream"),
        (
            "smoke",
            ["model.max_length=128", "samples.count=0"],
            "generate mine --prompt 'def fib(n):' --max-new-tokens 112",
        ),
        (
            "smoke",
            ["train.objective=masked", "model.attention.mask=bidirectional"],
            "export mine --to mine-hf --dry-run",
        ),
    ],
)
def test_a_run_ends_with_three_commands_that_can_be_parsed(name, overrides, first):
    experiment = resolve(name, overrides, 1)
    lines = next_steps(experiment, RunFolder("runs/mine"))
    assert len(lines) == 3 and lines[0].startswith(f"python -m experiments {first}")
    assert lines[1].startswith("python -m experiments report mine ")
    parser = make_parser(COMMANDS, DESCRIPTION, EPILOGUE)
    for line in lines:
        parser.parse_args(shlex.split(line, comments=True)[3:])


def test_the_end_of_a_run_compares_it_with_the_newest_other_run(tmp_path):
    for age, name in enumerate(("mine", "old", "new run", "elsewhere")):
        with open_run(tmp_path / "runs" / name, resolve("smoke", [], 8)) as run, MetricsWriter(run) as metrics:
            metrics.write({"kind": "train", "step": 1, "loss": 1.0})
        os.utime(run.metrics, (1e9 + age, 1e9 + age))
    (tmp_path / "runs" / "elsewhere").rename(tmp_path / "elsewhere")
    experiment = resolve("smoke", [], 8)
    assert "compare mine 'new run' " in next_steps(experiment, RunFolder("runs/mine"))[1]
    assert "compare 'new run' old " in next_steps(experiment, RunFolder(tmp_path / "runs" / "new run"))[1]
    assert f"report {tmp_path}/elsewhere" not in (line := next_steps(experiment, RunFolder(tmp_path / "elsewhere"))[1])
    assert f"compare {tmp_path}/elsewhere 'new run'" in line


def test_training_prints_the_three_commands_last(capsys, monkeypatch):
    monkeypatch.setattr("experiments.run.run_experiment", lambda *_, **__: True)
    code, out, _ = call(capsys, "train", "smoke")
    assert code == 0 and [line.split()[3] for line in out.splitlines()[1:]] == ["generate", "report", "train"]


# ---- the backend ----


def test_the_first_line_names_the_backend_and_its_devices():
    line = describe_backend("cpu", ["cpu"], "0.10.2", processor="AMD EPYC", files=[], platforms=None)
    assert line == ["backend: cpu, 1 device (AMD EPYC), jax 0.10.2"]
    line = describe_backend("tpu", ["TPU v5p"] * 4, "0.10.2", processor="", files=["/dev/accel0"], platforms=None)
    assert line == ["backend: tpu, 4 devices (TPU v5p), jax 0.10.2"]
    mixed = describe_backend("gpu", ["A", "A", "B"], "1", processor="", files=[], platforms=None)
    assert mixed == ["backend: gpu, 3 devices (2 x A, 1 x B), jax 1"]
    assert re.match(r"backend: cpu, 8 devices \(.+\), jax \d", backend_lines()[0])


@pytest.mark.parametrize(
    ("file", "platforms", "fix"),
    [
        ("/dev/nvidia0", None, "make install EXTRAS=dev,gpu"),
        ("/dev/accel0", None, "make install EXTRAS=dev,tpu"),
        ("/dev/kfd", None, "its maker"),
        ("/dev/nvidia0", "cpu", "unset it"),
    ],
)
def test_an_accelerator_that_jax_cannot_see_is_named_with_the_fix(file, platforms, fix):
    _, warning = describe_backend("cpu", ["cpu"], "1", processor="", files=[file], platforms=platforms)
    assert warning.startswith(f"warning: {file} is an accelerator") and fix in warning


# ---- signals and exit codes ----


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_a_signal_outside_the_loop_ends_the_command_with_a_word(capsys, monkeypatch, number, code, name):
    """As in data preparation or the final evaluation."""
    monkeypatch.setattr("experiments.run.run_experiment", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    got, out, err = call(capsys, "train", "smoke")
    assert (
        got == code and err == f"stopped by {name}: what was saved is kept, and the same command continues from there\n"
    )
    assert out.startswith("backend: cpu, 8 devices") and signal.getsignal(signal.SIGTERM) == before


def test_a_wrong_device_ends_the_command_with_its_own_code(capsys, monkeypatch):
    """Launchers do not repeat it (experiments/launch/supervise.py)."""

    def find(*_, **__) -> bool:
        raise DeviceError("process 1 (host w-1), device 3: computes differently from 7 of 8 TPU v5e")

    monkeypatch.setattr("experiments.run.run_experiment", find)
    code, _, err = call(capsys, "train", "smoke")
    assert code == EXIT_WRONG_DEVICE and err.startswith("error: process 1 (host w-1), device 3: computes differently")
    assert EXIT_WRONG_DEVICE in NEVER_AGAIN


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_during_garbage_collection_is_not_lost(number, error):
    """Python drops what a handler raises there, and the run would continue to its end and exit 0."""
    calls = []

    def collecting(phase: str, info: dict) -> None:
        if len(calls) < 2:
            calls.append(phase)
            signal.raise_signal(number)

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGALRM)], sys.unraisablehook
    gc.callbacks.append(collecting)
    try:
        with pytest.raises(error), stopped_by_sigterm():
            gc.collect()
            time.sleep(5)
    finally:
        gc.callbacks.remove(collecting)
    assert calls
    assert handlers == ([signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGALRM)], sys.unraisablehook)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 143)])
def test_a_run_that_was_asked_to_stop_is_not_a_finished_one(capsys, monkeypatch, number, code):
    """None: a peer of several processes was asked."""

    def stopped(*_, **__) -> bool:
        with StopSignal() as stop:
            if number is not None:
                signal.raise_signal(number)
            assert stop.number == number
        return False

    monkeypatch.setattr("experiments.run.run_experiment", stopped)
    assert call(capsys, "train", "smoke")[0] == code


def test_sigterm_while_data_is_prepared(tmp_path):
    """The program itself, from its first line on."""
    write_folder(tmp_path / "corpus")
    command = [sys.executable, "-m", "experiments", "train", "smoke", *tiny_overrides(tmp_path)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline().startswith("backend: cpu, ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "SIGTERM" in err and "Traceback" not in err, err


# ---- nothing held out ----


def test_eval_without_held_out_text_is_a_clear_error(capsys, tmp_path):
    from data.tokenizer import ByteTokenizer

    write_folder(tmp_path / "corpus", files=4)
    pairs = [*tiny_overrides(tmp_path)[1::2], "data.tokenizer.kind=byte", "data.holdout_fraction=0"]
    with open_run(tmp_path / "runs" / "mine", resolve("smoke", pairs, 8)) as run:
        ByteTokenizer().save(run.tokenizer)
    message = refusal(capsys, "eval", "mine")
    assert "data.holdout_fraction = 0" in message and "data.evaluation_sources" in message
