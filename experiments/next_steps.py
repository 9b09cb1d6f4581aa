"""What to try after a run: three commands that work for it."""

from __future__ import annotations

import shlex
from pathlib import Path

from experiments.command_help import PROGRAM
from train.config import Experiment
from train.records import RunFolder

NEW_TOKENS = 128  # of `generate`, unless it is asked for fewer
PROMPTS = {"stdlib": "def fib(n):"}  # by source; the prompt of other text is a word
PROMPT_TOKENS = 16  # room for a prompt
# What to train next, by experiment; "" is any other.
NEXT = {
    "quickstart": ("quickstart_dense", "the same network without experts"),
    "quickstart_dense": ("quickstart", "the same network with experts"),
    "": ("quickstart", "a mixture of experts, minutes on a CPU"),
}


def next_steps(experiment: Experiment, run: RunFolder) -> list[str]:
    """Return three commands, each as a line with a comment: use the run, look at it beside another run, and train
    something else."""
    name = _name_of(run)
    other = next(iter(_other_runs(run)), None)
    if other is not None:
        look = (f"compare {name} {_name_of(other)}", "overlay the curves of both runs")
    else:
        look = (f"report {name}", "write its report.html again")
    another, what = NEXT.get(experiment.name, NEXT[""])
    steps = [
        _use(experiment, name),
        look,
        (f"train {another}", what),
    ]
    commands = [f"{PROGRAM} {command}" for command, _ in steps]
    width = max(map(len, commands))
    return [f"{command:<{width}}  # {comment}" for command, (_, comment) in zip(commands, steps, strict=True)]


def _use(experiment: Experiment, name: str) -> tuple[str, str]:
    if not experiment.model.can_generate:
        return (f"export {name} --to {name}-hf --dry-run", "check whether transformers can load it")
    room = experiment.model.max_length - PROMPT_TOKENS
    fewer = f" --max-new-tokens {max(room, 1)}" if room < NEW_TOKENS else ""
    prompt = PROMPTS.get(experiment.data.sources[0].name, "The") if experiment.data.sources else "The"
    return (f"generate {name} --prompt {shlex.quote(prompt)}{fewer} --stream", "continue a prompt")


def _name_of(run: RunFolder) -> str:
    """Return how a command names the run: by its name if it lies under runs/, else by its path."""
    path = str(run.path)
    parent = Path(path).parent
    return shlex.quote(Path(path).name if "://" not in path and parent.resolve() == Path("runs").resolve() else path)


def _other_runs(run: RunFolder) -> list[RunFolder]:
    """Return the other runs under runs/ that have metrics, the newest first."""
    here = Path(str(run.path)).resolve()
    found = [
        path for path in Path("runs").glob("[!.]*/metrics.jsonl")
        if path.parent.resolve() != here and (path.parent / "overrides.json").exists()
    ]  # fmt: skip
    return [RunFolder(path.parent) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
