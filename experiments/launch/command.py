"""The command `launch`: check what it is given, and call the target."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches

from experiments.command_help import Command, make_parser
from experiments.launch.job import LaunchError, environment, program
from experiments.launch.tpu import PYTHON

PYTHONS = {"tpu": PYTHON, "gke": "python"}  # interpreters of targets that do not use this machine's


def check_experiments_command(words: Sequence[str], commands: dict[str, Command]) -> None:
    """Raise LaunchError if the words are a command of experiments with arguments that cannot be parsed, or that starts
    several processes which would not join."""
    if not words:
        return
    if words[0] not in commands:
        near = get_close_matches(words[0], commands, n=1, cutoff=0.75)
        if near and len(words) > 1 and shutil.which(words[0]) is None:
            raise LaunchError(f"{words[0]}: neither a command of experiments nor a program; did you mean {near[0]}?")
        return
    if words[0] == "launch":
        raise LaunchError("launch: the command after -- is what each process runs, and cannot be another launch")
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            make_parser(commands, "", "").parse_args(list(words))
    except SystemExit as exit:
        if exit.code:
            reason = errors.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            raise LaunchError(f"{' '.join(words)}: {reason}") from exit


def check_processes(words: Sequence[str], count: int) -> None:
    """Raise LaunchError if several processes would each train the same run."""
    if count > 1 and words[:1] == ["train"] and "--distributed" not in words:
        raise LaunchError(f"train on {count} processes: add --distributed, or each would train the run alone")


def launch(args: argparse.Namespace, commands: dict[str, Command]) -> int:
    """Run the job of a target and return its exit code. `commands` are those of experiments. Raises LaunchError."""
    check_experiments_command(args.words, commands)
    words = program(args.words, PYTHONS.get(args.target) or getattr(args, "python", None) or sys.executable, commands)
    variables = environment(args.env, os.environ)
    if args.target == "local":
        check_processes(args.words, args.processes)
    target = importlib.import_module(f"experiments.launch.{args.target}")
    return target.launch(args, words, variables)
