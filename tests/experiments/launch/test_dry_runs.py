"""What `launch TARGET --dry-run` prints, and what is refused before anything runs or is bought."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS, main
from experiments.command_help import make_parser
from experiments.launch.targets import TARGETS
from experiments.launch.tpu_types import FAMILIES, check_zone, find_slice
from tests.experiments.command_line import call, refusal
from tests.experiments.launch.launching import ROOT

TRAIN = ("--", "train", "smoke", "--distributed", "--run", "gs://b/one")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TPU = ("tpu", "--name", "one", "--accelerator", "v5litepod-16", "--zone", "us-central1-a", "--repo",
       "https://example.org/meshwork.git", "--commit", COMMIT)  # fmt: skip
GKE = ("gke", "--name", "one", "--cluster", "main", "--accelerator", "v5litepod-16", "--zone", "us-central1-a")


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a program was started"))


def printed(capsys, tmp_path: Path, *arguments: object) -> str:
    """Return what a dry run prints, with names for this machine's paths."""
    target, *more = arguments
    code, out, err = call(capsys, "launch", target, "--dry-run", *more)
    assert code == 0 and "error" not in err, err
    return out.replace(str(tmp_path), "/here").replace(sys.executable, "/python")


def test_local(capsys, tmp_path):
    out = printed(
        capsys, tmp_path, "local", "--processes", 2, "--env", "A=b c", "--", "train", "smoke", "--distributed"
    )
    assert out == "".join(
        f"JAX_COORDINATOR_ADDRESS=localhost:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} MESHWORK_RESTART=0 "
        f"MESHWORK_WORKER={i}/2 A='b c' /python -m experiments.launch.worker --watch-stdin -- /python -m experiments "
        "train smoke --distributed\n"
        for i in (0, 1)
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["list"], "/python -m experiments list"),
        (["python", "-m", "pallas_kernels.check"], "/python -m pallas_kernels.check"),
        (["make", "bench"], "make bench"),
        (["cd x && make"], "bash -c 'cd x && make'"),
    ],
)
def test_a_command_is_one_of_experiments_a_program_or_a_line_for_a_shell(capsys, tmp_path, words, expected):
    assert printed(capsys, tmp_path, "local", "--", *words).endswith(f"--watch-stdin -- {expected}\n")


def test_ssh(capsys, tmp_path):
    study = ("--", "study", "glu_variants", "--storage", "postgresql://USER:hidden@db/studies", "--worker")
    out = printed(capsys, tmp_path, "ssh", "--hosts", "user@a,b", "--env", "A=b c", *study)
    assert out == "".join(
        f"ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 {host} 'cd /here && exec env "
        f"JAX_COORDINATOR_ADDRESS=a:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} MESHWORK_RESTART=0 "
        """A='"'"'b c'"'"' /python -m experiments.launch.worker --watch-stdin -- /python -m experiments study """
        "glu_variants --storage postgresql://USER:***@db/studies --worker'\n"
        for i, host in enumerate(("user@a", "b"))
    )


def test_tpu(capsys, tmp_path):
    out = printed(capsys, tmp_path, *TPU, "--project", "p", "--spot", "--delete", "--queue-for", "6h", *TRAIN)
    at = "one --zone=us-central1-a --project=p"
    ssh = (
        f"gcloud compute tpus tpu-vm ssh {at} --worker=all --ssh-flag=-oServerAliveInterval=30 "
        "--ssh-flag=-oServerAliveCountMax=4 '--command="
    )
    folder = "meshwork-0123456789ab"
    assert out.splitlines() == [
        f"gcloud compute tpus queued-resources create {at} --node-id=one --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --valid-until-duration=6h",
        f"gcloud compute tpus queued-resources describe {at} '--format=value(state.state)'",
        f"{ssh}{{ test -d {folder} || git clone --quiet https://example.org/meshwork.git {folder}; }} && git -C "
        f"{folder} checkout --quiet {COMMIT} && cd {folder} && python3 -m pip install --quiet --user uv && "
        "~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv && ~/.local/bin/uv pip install --quiet "
        """--python .venv/bin/python --constraints constraints.txt --editable '"'"'.[tpu,gcs,study]'"'"' """
        """'"'"'psycopg[binary]'"'"''""",
        f"{ssh}cd {folder} && exec env MESHWORK_RESTART=0 .venv/bin/python -m experiments.launch.worker --lock "
        "../job.lock --hostname -- .venv/bin/python -m experiments train smoke --distributed --run gs://b/one'",
        f"gcloud compute tpus queued-resources delete {at} --force --quiet",
    ]


def test_tpu_sends_the_commit_of_this_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.launch.tpu._git", lambda *words: COMMIT if words[0] == "rev-parse" else "")
    lines = printed(capsys, tmp_path, *TPU[:7], "--setup", "true", *TRAIN).replace(str(ROOT), "/code").splitlines()
    archive = "meshwork-0123456789ab.tar.gz"
    assert lines[2] == f"git -C /code archive --format=tar.gz --output=/tmp/{archive} {COMMIT}"
    assert lines[3] == f"gcloud compute tpus tpu-vm scp /tmp/{archive} one: --zone=us-central1-a --worker=all"
    assert lines[4].endswith(
        f"'--command=mkdir -p meshwork-0123456789ab && tar --extract --gzip --file={archive} "
        "--directory=meshwork-0123456789ab && cd meshwork-0123456789ab && true'"
    )


def test_gke(capsys, tmp_path):
    out = printed(capsys, tmp_path, *GKE, "--base-image", "IMAGE", "--slices", 2, "--env", "A=b c", *TRAIN)
    assert out == (
        "xpk workload create --workload=one --cluster=main --zone=us-central1-a --tpu-type=v5litepod-16 --num-slices=2 "
        "--base-docker-image=IMAGE --max-restarts=3 --restart-on-exit-codes=75 '--env=A=b c' '--command=python -m "
        "experiments train smoke --distributed --run gs://b/one'\n"
    )
    assert "--docker-image=OWN" in printed(capsys, tmp_path, *GKE, "--image", "OWN", *TRAIN)


def test_slurm(capsys, tmp_path):
    options = ("--nodes", 2, "--gpus", 4, "--time", "12:00:00", "--partition", "gpu", "--env", "A=b c")
    out = printed(capsys, tmp_path, "slurm", *options, *TRAIN)
    assert out == (
        """\
sbatch <<'SCRIPT'
#!/bin/bash
#SBATCH --job-name=meshwork
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
#SBATCH --time=12:00:00
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --requeue
cd /here || exit 1
export MESHWORK_RESTART=${SLURM_RESTART_COUNT:-0}
export A='b c'
srun --kill-on-bad-exit=1 --label /python -m experiments train smoke --distributed --run gs://b/one
code=$?
case $code in
  0 | 1 | 2 | 76 | 126 | 127 | 130) exit $code ;;  # done, or nothing that a restart would change
esac
if [ "$MESHWORK_RESTART" -lt 3 ]; then
  echo "exit code $code: restart $((MESHWORK_RESTART + 1)) of 3"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
SCRIPT
"""
    )


@pytest.mark.parametrize(
    "target",
    [("local",), ("ssh", "--hosts", "a"), TPU, (*GKE, "--image", "I"), ("slurm",)],
    ids=lambda target: target[0],
)
def test_secrets_are_never_printed_and_the_line_can_still_be_pasted(capsys, tmp_path, monkeypatch, target):
    monkeypatch.setenv("WANDB_API_KEY", "hidden1")
    out = printed(capsys, tmp_path, *target, "--env", "WANDB_API_KEY", "--env", "HF_TOKEN=hidden2", *TRAIN)
    assert "hidden" not in out and '"$WANDB_API_KEY"' in out and '"$HF_TOKEN"' in out
    monkeypatch.undo()
    line = next(line for line in out.splitlines() if "HF_TOKEN" in line)
    shell = f'HF_TOKEN="x y"; printf "%s\\n" {line.removeprefix("export ")}'
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert "HF_TOKEN=x y" in words and "$HF_TOKEN" not in words


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("local",), "no command; write it after --"),
        (
            ("local", "--", "trian", "smoke"),
            "trian: neither a command of experiments nor a program; did you mean train?",
        ),
        (("local", "--", "train", "smoke", "--stepps", "3"), "unrecognized arguments: --stepps 3"),
        (("local", "--", "launch", "local"), "cannot be another launch"),
        (("local", "--processes", "2", "--", "train", "smoke"), "add --distributed"),
        (("local", "--env", "1=2", "--", "list"), "--env 1: names no variable"),
        (("local", "--env", "NOT_SET_HERE", "--", "list"), "the variable is not set here"),
        (("ssh", "--hosts", "a,b,a", *TRAIN), "a is named 2 times"),
        (("ssh", "--hosts=-oProxyCommand=x", *TRAIN), "'-oProxyCommand=x' is not the name of a host"),
        (("ssh", "--hosts", "./hosts.txt", *TRAIN), "there is no such file"),
        (("ssh", "--hosts", ",", *TRAIN), "names no host"),
        ((*TPU[:2], "One_a", *TPU[3:], *TRAIN), "--name One_a: use lower-case letters, digits and '-'"),
        ((*TPU[:2], "One_a", *TPU[3:], *TRAIN), "did you mean one-a?"),
        ((*TPU[:4], "v5lite-16", *TPU[5:], *TRAIN), "v5lite-16: unknown accelerator; did you mean v5litepod-16?"),
        ((*TPU[:4], "v5litepod-17", *TPU[5:], *TRAIN), "no slice has this size; did you mean v5litepod-16?"),
        ((*TPU[:4], "h100-8", *TPU[5:], *TRAIN), "unknown accelerator. The types are v4-N, v5litepod-N, v5p-N, v6e-N"),
        ((*TPU[:4], "tpu7x-8", *TPU[5:], *TRAIN), "use launch gke"),
        ((*TPU[:6], "us-cental1-a", *TPU[7:], *TRAIN), "unknown zone; did you mean us-central1-a?"),
        ((*TPU[:6], "us-central1", *TPU[7:], *TRAIN), "--zone us-central1: unknown zone"),
        ((*TPU, "--", "train", "smoke"), "v5litepod-16 has 4 hosts: add --distributed"),
        ((*GKE, *TRAIN), "give one of --image IMAGE"),
        ((*GKE[:4], "main_1", *GKE[5:], "--image", "I", *TRAIN), "--cluster main_1"),
        (("slurm", "--time", "soon", *TRAIN), "write minutes, HH:MM:SS or DAYS-HH:MM:SS"),
        (("slurm", "--partition", "a b", *TRAIN), "--partition a b: use letters"),
        (("slurm", "--gpus", "2", "--tasks", "3", *TRAIN), "give one of them"),
    ],
)
def test_mistakes_are_named_before_anything_runs(capsys, arguments, expected):
    target, *more = arguments
    for mode in ((), ("--dry-run",)):
        assert expected in refusal(capsys, "launch", target, *mode, *more)


@pytest.mark.parametrize(
    ("target", "program"),
    [(("ssh", "--hosts", "a"), "ssh"), (TPU, "gcloud"), ((*GKE, "--image", "I"), "xpk"), (("slurm",), "sbatch")],
)
def test_a_missing_program_is_named_with_the_way_to_install_it(capsys, monkeypatch, target, program):
    monkeypatch.setattr("shutil.which", lambda name: None)
    message = refusal(capsys, "launch", *target, *TRAIN)
    assert message.startswith(f"error: {program} is not installed here; to install it: ")


def test_a_zone_that_is_not_listed_is_a_warning(capsys):
    target, *more = (*TPU[:6], "us-east5-a", *TPU[7:])
    code, out, err = call(capsys, "launch", target, "--dry-run", *more, *TRAIN)
    assert code == 0 and "--zone=us-east5-a" in out
    assert "warning: --zone us-east5-a: not among the known zones of this type, which are us-central1-a" in err


def test_a_run_on_a_disk_of_the_slice_is_a_warning(capsys):
    target, *more = TPU
    code, _, err = call(capsys, "launch", target, "--dry-run", *more, "--", "train", "smoke", "--distributed")
    assert code == 0 and "add --run gs://BUCKET/NAME" in err


@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [
        ("v4-8", 4, 1), ("v4-64", 32, 8), ("v5litepod-1", 1, 1), ("v5litepod-8", 8, 1), ("v5litepod-16", 16, 4),
        ("v5litepod-256", 256, 64), ("v5p-8", 4, 1), ("v5p-16", 8, 2), ("v5p-128", 64, 16), ("v5p-12288", 6144, 1536),
        ("v6e-8", 8, 1), ("v6e-16", 16, 4), ("v6e-256", 256, 64),
    ],
)  # fmt: skip
def test_chips_and_hosts_of_a_slice(name, chips, hosts):
    """As in the tables of https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e."""
    found = find_slice(name)
    assert (found.chips, found.hosts) == (chips, hosts)


def test_every_known_zone_is_accepted():
    for family in FAMILIES.values():
        assert all(check_zone(zone, family) is None for zone in family.zones)
        assert all("not checked" in (check_zone(zone, family) or "") for zone in family.unverified)


# ---- help ----


@pytest.mark.parametrize("name", TARGETS)
def test_the_help_of_a_target_fits_and_states_its_defaults(capsys, monkeypatch, name):
    target = TARGETS[name]
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main(["launch", name, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and target.summary in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("usage", "  python")))
    options = out.partition("options:")[2].partition("example")[0]
    for text in re.split(r"\n(?=  -)", options)[1:]:
        words = " ".join(text.split())
        flag = not re.match(r"--[a-z-]+ [A-Z]", words)
        assert flag or words.startswith("-h") or "default:" in words or "required" in words, words
    for example in target.examples:
        args = make_parser(COMMANDS, "", "").parse_args(shlex.split(example))
        assert args.target == name and args.words[0] in COMMANDS
