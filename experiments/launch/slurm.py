"""The target `slurm`: a batch script with one process for each task, which SLURM starts and requeues.

Under `srun` JAX finds the other processes from SLURM's variables (jax/_src/clusters/slurm_cluster.py), and gives each
process the one GPU whose number is its task's number on the node: hence one task for each GPU. The script requeues its
job after a failure, a node that is lost, or the time limit, of which SLURM warns the processes with SIGTERM.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.launch.job import RESTART, LaunchError, placeholders, require, shown
from experiments.launch.supervise import say

SCRIPT = """\
#!/bin/bash
{options}
cd {folder} || exit 1
export {restart}=${{SLURM_RESTART_COUNT:-0}}
{variables}srun --kill-on-bad-exit=1 --label {command}
code=$?
case $code in
  0 | 1 | 2 | 76 | 126 | 127 | 130) exit $code ;;  # done, or nothing that a restart would change
esac
if [ "${restart}" -lt {restarts} ]; then
  echo "exit code $code: restart $(({restart} + 1)) of {restarts}"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def script(args: Namespace, words: Sequence[str], variables: Mapping[str, str], folder: str) -> str:
    """Return the batch script."""
    tasks = args.gpus or args.tasks
    options = {
        "job-name": args.name, "nodes": args.nodes, "ntasks-per-node": tasks, "gpus-per-node": args.gpus,
        "partition": args.partition, "account": args.account, "time": args.time,
        "output": f"{args.logs}/%x-%j.log", "open-mode": "append",
        "signal": f"TERM@{args.warning}" if args.time else None,
    }  # fmt: skip
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return SCRIPT.format(
        options="\n".join([*lines, "#SBATCH --requeue"]), folder=shlex.quote(folder), restart=RESTART,
        variables=exports, command=shlex.join(words), restarts=args.restarts,
    )  # fmt: skip


def check(args: Namespace) -> None:
    """Raise LaunchError for values that sbatch would misread."""
    for option in ("name", "partition", "account", "time", "logs"):
        value = getattr(args, option)
        if value is not None and not re.fullmatch(r"[\w./:-]+", value):
            raise LaunchError(f"--{option} {value}: use letters, digits, '.', '_', '-', ':' and '/'")
    if args.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", args.time):
        raise LaunchError(f"--time {args.time}: write minutes, HH:MM:SS or DAYS-HH:MM:SS")
    if args.gpus and args.tasks != 1:
        raise LaunchError(f"--tasks {args.tasks} and --gpus {args.gpus}: give one of them; each GPU gets one task")


def launch(args: Namespace, words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Submit the job, or print the script. Return sbatch's exit code. Raises LaunchError."""
    check(args)
    if args.dry_run:
        print("sbatch <<'SCRIPT'")
        print(shown_script(script(args, words, placeholders(variables), os.getcwd())), end="")
        print("SCRIPT")
        return 0
    require("sbatch")
    Path(args.logs).mkdir(parents=True, exist_ok=True)
    text = script(args, words, variables, os.getcwd())
    done = subprocess.run(["sbatch", "--parsable"], input=text, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode == 0:
        job = done.stdout.strip().partition(";")[0]
        say(
            f"submitted job {job}; its output: {args.logs}/{args.name}-{job}.log; to stop it: {shown(['scancel', job])}"
        )
        print(job)
    return done.returncode


def shown_script(text: str) -> str:
    """Return a script for printing, with secrets as references to variables that sbatch passes on."""
    return re.sub(r"__SECRET_(\w+?)__", r'"$\1"', text)
