"""Bad input gives one paragraph with field, value and fix, and exit code 1, before anything is compiled."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.__main__ import main
from tests.experiments.command_line import call, refusal, tiny_overrides, write_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch, tmp_path):
    """Run in an empty folder, with a compiler that fails."""
    monkeypatch.chdir(tmp_path)

    def refuse(self, *args, **kwargs):
        raise AssertionError("compiled before the input was checked")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr("train.loop.Progress", refuse)


def settings(*pairs: str) -> list[str]:
    return [argument for pair in pairs for argument in ("--set", pair)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.moe.topk=1"], ["model.moe.topk", "did you mean 'model.moe.top_k'"]),
        (["optimizer.lr=1"], ["optimizer.lr"]),
        (["train.steps=many"], ["train.steps = many", "int like 4"]),
        (["train.steps=1.5"], ["train.steps = 1.5", "int"]),
        (["model.tied_embeddings=maybe"], ["model.tied_embeddings = maybe", "true"]),
        (["optimizer.name=sgd"], ["optimizer.name = sgd", "adamw, lion, adafactor, muon"]),
        (["model.moe"], ["write name=value"]),
        (
            ["model.attention.num_heads=6", "model.attention.num_kv_heads=4"],
            ["model.attention.num_kv_heads = 4", "num_heads = 6", "1, 2, 3, 6"],
        ),
        (["model.moe.top_k=5"], ["model.moe.top_k = 5", "model.moe.num_experts = 4"]),
        (
            ["model.moe.capacity_factor=0.001"],
            ["model.moe.capacity_factor = 0.001", "data.sequence_length = 128", "less than one", "0.016 or more"],
        ),
        (["model.moe.router=expert_choice"], ["model.moe.router = 'expert_choice'", "later ones", "bidirectional"]),
        (["model.moe.groups=4,1"], ["model.moe.groups = (4, 1)", "top_k = 2", "2 groups or more"]),
        (["mesh.fsdp=3"], ["fsdp=3", "needs a multiple of 3 devices", "8"]),
        (["mesh.data=16"], ["data=16", "16", "8"]),
        (
            ["mesh.fsdp=4", "mesh.tensor=2"],
            ["model.attention.num_kv_heads = 1", "2 devices", "sharding.weights.kv_heads"],
        ),
        (["mesh.expert=8", "mesh.fsdp=1"], ["model.moe.num_experts = 4", "8 devices"]),
        (
            ["mesh.expert=4", "mesh.fsdp=2", "sharding.weights.expert=fsdp", "sharding.weights.embed=()"],
            ["model.moe.num_experts = 4", "8 devices", "sharding.weights.expert", "sharding.activations.expert"],
        ),
        (["data.batch_size=12"], ["data.batch_size = 12", "8"]),
        (["train.microbatches=3"], ["data.batch_size = 8", "train.microbatches = 3", "multiple of 24"]),
        (["data.sequence_length=512"], ["data.sequence_length = 512", "model.max_length = 256"]),
        (["data.sequence_length=1"], ["data.sequence_length = 1", "2 or more"]),
        (["samples.new_tokens=500"], ["samples.new_tokens = 500", "model.max_length = 256"]),
        (["model.vocab_size=512"], ["model.vocab_size = 512", "1024 ids", "0 (fitted)"]),
        (["data.tokenizer.vocab_size=100"], ["data.tokenizer.vocab_size = 100", "byte"]),
        (["train.objective=masked"], ["train.objective = 'masked'", "bidirectional"]),
        (["model.attention.mask=bidirectional"], ["model.attention.mask = 'bidirectional'", "causal"]),
        (["optimizer.learning_rate=0"], ["optimizer.learning_rate = 0.0", "above 0"]),
        (["train.log_every=0"], ["train.log_every = 0", "at least 1"]),
        (["data.sources.0.weight=-1"], ["'stdlib'", "weight = -1"]),
        (["sharding.weights.mlp=tensr"], ["sharding.weights.mlp = 'tensr'", "tensor"]),
        (["sharding.activations.embed=tensor"], ["sharding.activations", "'tensor' is used twice", "embed"]),
        (["sharding.weights.layer=stage"], ["sharding.weights.layer", "set it to ()"]),
        (["mesh.stage=2", "mesh.fsdp=4"], ["mesh.stage = 2", "set it to 1"]),
        (["train.eval_stride=129"], ["train.eval_stride = 129", "data.sequence_length = 128"]),
        (["train.objective=prefix"], ["train.objective = 'prefix'", "model.attention.mask = 'causal'"]),
        (["samples.temperature=-1"], ["temperature = -1.0", "0 or more"]),
        (["samples.new_tokens=0"], ["new_tokens = 0", "at least 1"]),
        (["optimizer.betas=1,0.95"], ["optimizer.betas = (1.0, 0.95)", "[0, 1)"]),
        (["optimizer.betas=0.9"], ["optimizer.betas = (0.9,)", "two decay rates"]),
        (["optimizer.epsilon=0"], ["optimizer.epsilon = 0.0", "above 0"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "show"])
def test_an_impossible_config_is_refused(capsys, command, overrides, expected):
    message = refusal(capsys, command, "smoke", *settings(*overrides))
    assert all(part in message for part in expected), message
    assert not Path("runs").exists(), "nothing is left behind"


def test_an_unknown_experiment_is_refused(capsys):
    message = refusal(capsys, "train", "quikstart")
    assert "'quikstart'" in message and "did you mean 'quickstart'" in message and "quickstart_dense" in message
    assert "the experiments are" in refusal(capsys, "show", "zzz")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ["folder", "corpus"]),
        ({"empty.py": b""}, ["folder", "empty"]),
        ({"binary.py": b"\xff\xfe\xfd"}, ["folder", "skipped"]),
    ],
    ids=["no file", "an empty file", "no text"],
)
def test_an_empty_corpus_is_refused(capsys, tmp_path, files, expected):
    (tmp_path / "corpus").mkdir()
    for name, content in files.items():
        (tmp_path / "corpus" / name).write_bytes(content)
    message = refusal(capsys, "train", "smoke", *tiny_overrides(tmp_path))
    assert all(part in message for part in expected), message


def test_a_missing_corpus_is_refused(capsys, tmp_path):
    assert "corpus" in refusal(capsys, "train", "smoke", *tiny_overrides(tmp_path))


def test_a_corpus_too_small_for_the_vocabulary_is_refused(capsys, tmp_path):
    write_folder(tmp_path / "corpus", files=10)
    message = refusal(capsys, "train", "smoke", *tiny_overrides(tmp_path), *settings("data.tokenizer.vocab_size=4096"))
    assert "data.tokenizer.vocab_size = 4096" in message and "byte" in message


@pytest.mark.parametrize("command", ["eval", "generate", "report"])
def test_a_missing_run_is_refused(capsys, command):
    prompt = ["--prompt", "x"] if command == "generate" else []
    message = refusal(capsys, command, "nowhere", *prompt)
    assert "'nowhere'" in message and "config.json" in message and "train quickstart" in message
    assert "'nowhere'" in refusal(capsys, "train", "smoke", "--resume", "nowhere")


@pytest.mark.parametrize("steps, message", [("9-3", "Try 3-9"), ("x", "'x': not steps"), ("1-5000", "Try 1-100")])
def test_profile_steps_that_are_no_range_are_refused(capsys, steps, message):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "smoke", "--profile", steps])
    assert message in capsys.readouterr().err


def test_profile_steps_that_the_run_does_not_have_are_refused(capsys, tmp_path):
    arguments = ["train", "smoke", "--run", f"{tmp_path}/run", "--set", "train.steps=30", "--profile", "28-31"]
    assert main(arguments) == 1
    assert "--profile 28-31: the run has 30 steps" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_resume_and_run_together_are_refused(capsys):
    assert "give one of them" in refusal(capsys, "train", "smoke", "--resume", "a", "--run", "b")


def test_a_run_folder_of_another_config_is_refused(capsys, tmp_path):
    """Left unfinished by a process that died."""
    from experiments.resolve import resolve
    from train.records import MetricsWriter, open_run

    pairs = tiny_overrides(tmp_path)[1::2]
    with open_run(tmp_path / "runs" / "mine", resolve("smoke", pairs, 8)) as run, MetricsWriter(run) as metrics:
        metrics.write({"kind": "event", "step": 0, "event": "started"})
    message = refusal(capsys, "train", "smoke", "--run", "mine", *settings(*pairs, "train.seed=3"))
    assert "train.seed: 0 -> 3" in message and "--run NEWNAME" in message and "--override" in message


def test_a_run_folder_in_use_is_refused(capsys, tmp_path):
    from experiments.resolve import resolve
    from train.records import open_run

    pairs = tiny_overrides(tmp_path)[1::2]
    with open_run(tmp_path / "runs" / "mine", resolve("smoke", pairs, 8)):
        message = refusal(capsys, "train", "smoke", "--run", "mine", *settings(*pairs))
    assert "in use by process" in message


def test_a_run_without_a_checkpoint_is_refused(capsys, tmp_path):
    from data.tokenizer import ByteTokenizer
    from experiments.resolve import resolve
    from train.records import open_run

    pairs = [*tiny_overrides(tmp_path)[1::2], "data.tokenizer.kind=byte"]
    with open_run(tmp_path / "runs" / "mine", resolve("smoke", pairs, 8)) as run:
        ByteTokenizer().save(run.tokenizer)
    write_folder(tmp_path / "corpus", files=10)
    for arguments in (["eval", "mine"], ["generate", "mine", "--prompt", "x"]):
        message = refusal(capsys, *arguments)
        assert "no checkpoint" in message and "train smoke" in message


def test_a_damaged_config_is_refused(capsys, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{")
    assert "config.json" in refusal(capsys, "eval", "mine")


def test_a_cache_that_cannot_be_written_is_refused(capsys, tmp_path):
    write_folder(tmp_path / "corpus", files=10)
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert str(tmp_path / "cache") in refusal(capsys, "train", "smoke", *tiny_overrides(tmp_path))


@pytest.mark.parametrize("arguments", [[], ["tarin"], ["train"], ["generate", "x"], ["eval", "x", "--step", "many"]])
def test_a_command_line_that_cannot_be_parsed_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage" in capsys.readouterr().err


def test_list_prints_one_line_for_each_experiment_into_a_pipe(capsys):
    from experiments.named import EXPERIMENTS

    code, out, _ = call(capsys, "list")
    head, *lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == list(EXPERIMENTS) and "question" in head
    for line, make in zip(lines, EXPERIMENTS.values(), strict=True):
        assert make().question in line and make().cost in line
    assert out.isascii() and all(line == line.rstrip() for line in lines)


def test_list_and_help_start_without_jax():
    code = """
import sys
from experiments.__main__ import main
main(["list"])
try:
    main(["train", "--help"])
except SystemExit:
    pass
heavy = {"jax", "flax", "numpy", "matplotlib", "orbax", "grain"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_help_fits_its_terminal_and_has_an_example(capsys, monkeypatch):
    """Usage and examples, which are copied, are never wrapped."""
    from experiments.__main__ import COMMANDS

    for columns in ("80", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            main(["--help"])
        out = capsys.readouterr().out
        assert all(
            re.search(rf"^  {name} +{re.escape(each.summary)}$", out, re.MULTILINE) for name, each in COMMANDS.items()
        )
        assert all(len(line) <= 80 for line in out.splitlines())
        for name, each in COMMANDS.items():
            with pytest.raises(SystemExit) as exit:
                main([name, "--help"])
            out = capsys.readouterr().out
            assert exit.value.code == 0 and each.summary in out and "--help" in out
            for example in each.examples:
                assert f"\n  python -m experiments {example}\n" in out and example.split()[0] == name
            assert all(len(line) <= int(columns) or line.startswith(("usage", "  python")) for line in out.splitlines())


def test_the_examples_of_the_help_can_be_parsed():
    from experiments.__main__ import COMMANDS, DESCRIPTION, EPILOGUE
    from experiments.command_help import make_parser

    parser = make_parser(COMMANDS, DESCRIPTION, EPILOGUE)
    for name, command in COMMANDS.items():
        for example in command.examples:
            assert parser.parse_args(shlex.split(example)).command == name


def test_every_option_with_a_default_states_it(capsys):
    from experiments.__main__ import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        options = capsys.readouterr().out.partition("options:")[2].partition("example")[0]
        for text in re.split(r"\n(?=  -)", options)[1:]:
            words = " ".join(text.split())
            flag = not re.match(r"--[a-z-]+ [A-Z{]", words)
            optional = words.startswith(("-h", "--set", "--resume", "--system", "--run NEW"))
            assert flag or optional or "default:" in words or "required" in words, words


def test_show_prints_config_parameters_and_costs(capsys):
    """The config for 4 devices, which need not exist; the bytes per device add up."""
    code, out, _ = call(capsys, "show", "smoke", "--devices", "4", *settings("data.batch_size=4", "mesh.fsdp=2"))
    assert code == 0 and re.search(r"data\.batch_size\s+4", out) and "mesh: data=2 x fsdp=2;" in out
    rows = re.findall(r"^(\S+)\s+\((\d[\d, ]*)\)\s+float32\s+\((.*)\)\s+[\d,]+\s+([\d,]+)$", out, re.MULTILINE)
    assert {"embedding", "stacks/0/0/mlp/up", "final_norm/scale"} <= {name for name, *_ in rows}
    total = sum(int(size.replace(",", "")) for *_, size in rows)
    assert f"weights per device: {total:,} bytes" in out and "FLOPs per token" in out
    sizes = {name: int(size.replace(",", "")) for name, *_, size in rows}
    table = out.partition("\nparameter ")[2]
    for module, parameters, size in re.findall(r"^(\S+) +([\d,]+) +([\d,]+)$", table, re.MULTILINE):
        below = [each for each in sizes if module == "total" or each.rpartition("/")[0] == module]
        assert int(size.replace(",", "")) == sum(sizes[each] for each in below), module
        numbers = [math.prod(map(int, re.findall(r"\d+", shape))) for name, shape, *_ in rows if name in below]
        assert int(parameters.replace(",", "")) == sum(numbers), module


def test_a_refusal_from_a_shell_exits_1(tmp_path):
    """From a shell: exit code 1, one paragraph on stderr without a traceback, and an empty stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "smoke", "--set", "model.moe.topk=1"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert json.dumps(done.stderr).count("error: ") == 1
