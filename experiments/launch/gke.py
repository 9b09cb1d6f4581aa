"""The target `gke`: a workload (a JobSet) on a GKE cluster, which `xpk` submits and Kubernetes restarts.

Flags are those of xpk 1.9 (https://github.com/AI-Hypercomputer/xpk, src/xpk/parser/workload.py). xpk restarts a
workload on the exit codes 42 and 127 to 255 by default; 75 (a hang, or a lost peer) must be added.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Mapping, Sequence

from experiments.launch.job import LaunchError, check_name, placeholders, require, shown
from experiments.launch.supervise import say
from experiments.launch.tpu_types import check_zone, find_slice

RESTART_CODES = "75"


def command_line(args: Namespace, words: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Return the xpk command."""
    image = f"--docker-image={args.image}" if args.image else f"--base-docker-image={args.base_image}"
    project = [] if args.project is None else [f"--project={args.project}"]
    return [
        "xpk", "workload", "create", f"--workload={args.name}", f"--cluster={args.cluster}", f"--zone={args.zone}",
        *project, f"--tpu-type={args.accelerator}", f"--num-slices={args.slices}", image,
        f"--max-restarts={args.restarts}", f"--restart-on-exit-codes={RESTART_CODES}",
        *(f"--env={name}={value}" for name, value in variables.items()), f"--command={shlex.join(words)}",
    ]  # fmt: skip


def check(args: Namespace) -> None:
    """Raise LaunchError for names that cannot be right, before anything is submitted."""
    check_name("--name", args.name)
    check_name("--cluster", args.cluster)
    family = None
    if not re.fullmatch(r"tpu7x-\d+", args.accelerator):
        family = find_slice(args.accelerator).family
    if warning := check_zone(args.zone, family):
        say(f"warning: {warning}")
    if bool(args.image) == bool(args.base_image):
        raise LaunchError(
            "launch gke: give one of --image IMAGE, which holds the code, and --base-image IMAGE, to which xpk adds "
            "this folder; both must hold what `pip install -e '.[tpu,gcs]'` installs"
        )


def launch(args: Namespace, words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Submit the workload, or print the command. Return xpk's exit code. Raises LaunchError."""
    check(args)
    if args.dry_run:
        print(shown(command_line(args, words, placeholders(variables))))
        return 0
    require("xpk")
    code = subprocess.run(command_line(args, words, variables), check=False).returncode
    if code == 0:
        delete = ["xpk", "workload", "delete", f"--workload={args.name}", f"--cluster={args.cluster}"]
        say(f"submitted; to stop it: {shown([*delete, f'--zone={args.zone}'])}")
    return code
