"""The documentation shows valid commands, existing files and links, and output that is printed (tests/docs.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS as SUBCOMMANDS
from experiments.command_help import make_parser
from experiments.named import EXPERIMENTS
from experiments.resolve import fill_vocabulary, resolve
from experiments.search.space import check_space, read_space
from experiments.study.launch import load_study
from pallas_kernels.bench import OPERATIONS
from tests.docs import FILES, PAGES, ROOT, Command, commands, inline_code, marked, missing_line, run
from train.config_io import apply_overrides

OTHER_PROGRAMS = ("git", "cd", "optuna-dashboard", "gcloud", "ssh-add")
COMMANDS = [command for page in PAGES for command in commands(page)]
RUNS = {*EXPERIMENTS}  # and what commands name with --run, --name and --to
for _command in COMMANDS:
    RUNS |= set(re.findall(r"--(?:run|name|to) ([\w-]+)", _command.text))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_valid(command: Command):
    for part in command.text.split("&&"):
        check(Command(command.page, command.line, part.strip(), command.output))


def check(command: Command) -> None:
    variables, words = command.words()
    if words[0] == "make":
        for word in words[1:]:
            name, equals, _ = word.partition("=")
            pattern = rf"^{name} \?=" if equals else rf"^{name}:.*## "
            assert re.search(pattern, MAKEFILE, re.MULTILINE), f"{command}: the Makefile has no {name}"
    elif words[:2] == ["python", "-m"]:
        module = words[2]
        if module == "experiments":
            check_experiments(command, variables, words[3:])
        elif module != "pip":
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{module}.__main__")
            assert spec is not None, f"{command}: there is no module {module}"
        if module in ("pallas_kernels.bench", "pallas_kernels.check"):
            named = [word for word in words[3:] if word.isidentifier()]
            assert set(named) <= {*OPERATIONS}, f"{command}: choose from {OPERATIONS}"
    else:
        assert words[0] in OTHER_PROGRAMS, f"{command}: {words[0]} is none of {OTHER_PROGRAMS}"


def check_experiments(command: Command, variables: dict[str, str], words: list[str]) -> None:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = make_parser(SUBCOMMANDS, "", "").parse_args(words)
    except SystemExit:
        pytest.fail(f"{command}: {errors.getvalue()}")
    if args.command == "launch" and args.words and args.words[0] in SUBCOMMANDS:
        check_experiments(Command(command.page, command.line, command.text), variables, args.words)
    subject, overrides = getattr(args, "subject", None), getattr(args, "overrides", [])
    if subject is None or args.command in ("import", "new-study"):
        return
    if args.command == "study":
        if subject not in ("NAME", "my_study"):
            load_study(subject)
        return
    known = subject in RUNS or subject == subject.upper() or subject.startswith("gs://BUCKET/")
    assert known, f"{command}: {subject} names neither an experiment nor a run"
    if command.refused:
        with pytest.raises(ValueError) as raised:
            resolve(subject, overrides, 1)
        assert command.output[0] == f"error: {raised.value}", command
        return
    experiment = fill_vocabulary(apply_overrides(EXPERIMENTS.get(subject, EXPERIMENTS["smoke"])(), overrides))
    if subject in EXPERIMENTS:
        experiment.validate(device_count(args, variables))
    if args.command == "search":
        check_space(experiment, read_space(args.space))


def device_count(args, variables: dict[str, str]) -> int:
    """Return the number of devices that a command is for."""
    if topology := getattr(args, "topology", None):
        return math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2])))
    simulated = re.search(r"device_count=(\d+)", variables.get("XLA_FLAGS", ""))
    return getattr(args, "devices", None) or (int(simulated[1]) if simulated else 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_that_a_page_sets_exist(page: Path):
    for field, value in re.findall(r"--set '?([a-z][\w.]+)=([^\s'`]+)", page.read_text(encoding="utf-8")):
        if value.isupper():  # a placeholder
            continue
        if "model.num_layer=" not in f"{field}={value}":  # shown as an error
            apply_overrides(EXPERIMENTS["smoke"](), [f"{field}={value}"])


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "experiments/LOG.md"], ids=lambda page: page.name
)
def test_links_and_paths_of_a_page_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}: {target} has no such heading"
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier())
    for code in inline_code(page):
        if re.fullmatch(rf"({folders})/[\w./-]*(:\w+)?", code) and not code.startswith("runs/"):
            assert (ROOT / code.partition(":")[0]).exists(), f"{page.name}: {code}"


def test_the_line_counts_of_the_readme_hold():
    stated = re.search(
        r"\*\*Meshwork\*\* \| JAX, Flax \| ([\d,]+) \| ([\d,]+)", (ROOT / "README.md").read_text("utf-8")
    )
    assert stated is not None
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    for number, folders in ((stated[1], rooms), (stated[2], {"tests"})):
        lines = sum(file.read_bytes().count(b"\n") for folder in folders for file in (ROOT / folder).rglob("*.py"))
        assert lines == pytest.approx(int(number.replace(",", "")), rel=0.1), f"{sorted(folders)}: {lines} lines"


def test_commands_and_their_output_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.ROOT", tmp_path)
    page.write_text(
        "Text with `make\ntest` and `code`.\n\n<!-- run: notes -->\n\n```bash\n# a comment\nmake \\\n  lint\n```\n\n"
        "    $ python -m a b\n    shown 1\n\n<!-- run -->\n\n| `python -m c` |\n"
    )
    found = [(c.line, c.text, c.output, c.group, c.files) for c in commands(page)]
    assert found == [
        (1, "make test", (), None, None),
        (8, "make lint", (), 4, "notes"),
        (12, "python -m a b", ("shown 1", ""), None, None),
        (17, "python -m c", (), 15, None),
    ]


def test_shown_output_is_compared_line_by_line():
    shown = ("step 1  loss 8.3", "[...]", "error: a = 3")
    assert missing_line(shown, ["step 20  loss 1.25e-3", "more", "error: a = 3"]) is None
    assert missing_line(shown, ["step 20  loss 1.2", "error: a = 4"]) == "error: a = 3"
    assert missing_line(shown, ["error: a = 3", "step 20  loss 1.2"]) == "error: a = 3"
    assert missing_line(("a 1",), ["b 1"]) == "a 1"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if marked(page)], ids=lambda page: page.name)
def test_marked_commands_run_and_print_what_the_page_shows(page: Path, tmp_path):
    for command in marked(page):
        if command.files and not (tmp_path / command.files).exists():
            FILES[command.files](tmp_path)
        run(command, tmp_path)
