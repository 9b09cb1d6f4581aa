"""What every target needs: the program that COMMAND names, its environment, and how both are printed.

COMMAND is one of
    train quickstart --distributed      a command of `python -m experiments`, and its arguments
    python -m pallas_kernels.check      a program and its arguments; `python` is the interpreter of the target
    'cd ../other && make bench'         one word with spaces: a line for bash
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
RESTART = "MESHWORK_RESTART"  # how often the launcher has started the job again; train/records.py records it
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # of a cloud resource; xpk allows 40 characters
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"(\w://[^:/@\s]*:)[^@\s]+@")
PROGRAMS = {  # how to install what a target calls
    "ssh": "apt-get install openssh-client",
    "git": "apt-get install git",
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "xpk": "pip install xpk, with kubectl and gcloud (https://github.com/AI-Hypercomputer/xpk)",
    "sbatch": "run this on a login node of the cluster, or apt-get install slurm-client",
}


class LaunchError(ValueError):
    """A job that cannot be launched; the message is one paragraph for the user."""


def program(words: Sequence[str], python: str, commands: Collection[str]) -> list[str]:
    """Return the program that the words of COMMAND name, with its arguments. `commands` are those of experiments.

    Raises LaunchError if there are no words.
    """
    if not words:
        raise LaunchError("launch: no command; write it after --, as in: launch local -- train quickstart")
    if len(words) == 1 and re.search(r"\s", words[0]):
        return ["bash", "-c", words[0]]
    if words[0] in commands:
        return [python, "-m", "experiments", *words]
    return [python, *words[1:]] if words[0] == "python" else list(words)


def environment(settings: Iterable[str], here: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `--env NAME=VALUE`; `--env NAME` copies the value from `here`. Raises LaunchError."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise LaunchError(f"--env {name}: names no variable; write NAME=VALUE, or NAME to copy its value from here")
        if not equals and name not in here:
            raise LaunchError(f"--env {name}: the variable is not set here; set it, or write --env {name}=VALUE")
        found[name] = value if equals else here[name]
    return found


def check_name(option: str, name: str) -> None:
    """Raise LaunchError unless `name` can name a cloud resource."""
    if not NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
        hint = f"; did you mean {near}?" if NAME.fullmatch(near) else ""
        raise LaunchError(
            f"{option} {name}: use lower-case letters, digits and '-', at most 40, with a letter first{hint}"
        )


def require(*names: str) -> None:
    """Raise LaunchError if a program is missing on this machine."""
    for name in names:
        if shutil.which(name) is None:
            raise LaunchError(f"{name} is not installed here; to install it: {PROGRAMS[name]}")


# ---- printing ----


def placeholders(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for printing: the values of secrets replaced by a text that `shown` turns into $NAME."""
    return {name: f"__SECRET_{name}__" if SECRET.search(name) else value for name, value in variables.items()}


def shown(words: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Return a command line as one types it. Secrets appear as "$NAME", and passwords in URLs as ***."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in placeholders(variables or {}).items()]
    text = PASSWORD_IN_URL.sub(r"\1***@", " ".join([*settings, shlex.join(words)]))
    return _with_references(text)


def _with_references(text: str) -> str:
    """Replace the placeholders of secrets by references to variables, which a single-quoted word must leave."""
    parts, quoted, position = [], False, 0
    for match in re.finditer(r"__SECRET_(\w+?)__", text):
        before = text[position : match.start()]
        quoted ^= before.count("'") % 2 == 1
        reference = f'"${match[1]}"'
        parts += [before, f"'{reference}'" if quoted else reference]
        position = match.end()
    return "".join([*parts, text[position:]])
