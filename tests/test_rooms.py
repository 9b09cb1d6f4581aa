"""Allowed imports between the project's folders, and limits on function length."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARROWS = {
    "pallas_kernels": {"pallas_kernels", "jax", "numpy", "jaxtyping"},
    "sharding": {"sharding", "jax", "numpy", "jaxtyping"},
    "model": {"model", "sharding", "pallas_kernels", "jax", "flax", "numpy", "jaxtyping"},
    "interop": {"interop", "model", "sharding", "jax", "flax", "numpy", "jaxtyping", "gguf"},
    "compression": {"compression", "model", "interop", "data", "jax", "flax", "numpy", "jaxtyping"},
    "data": {"data", "jax", "etils", "fsspec", "grain", "sentencepiece", "numpy", "gguf", "jinja2"},
    "train": {"train", "model", "sharding", "data"},
    "decode": {"decode", "model", "sharding", "data", "jax", "flax", "numpy", "jaxtyping"},
    "experiments": {"experiments", "train", "decode", "interop", "model", "sharding", "data", "pallas_kernels"},
}
LIBRARIES = {"train", "experiments"}  # these may import any dependency


@pytest.mark.parametrize("room", ARROWS)
def test_a_folder_imports_only_allowed_modules(room):
    for file in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                names = [node.module]
            if room != "pallas_kernels":
                inner = [name for name in names if name.startswith("pallas_kernels.") and name.count(".") > 1]
                assert not inner, f"{file}:{node.lineno}: {inner[0]} is not the api of a kernel"
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - ARROWS[room]:
                ours = top in ARROWS or top == "tests"
                assert room in LIBRARIES and not ours, f"{file.relative_to(ROOT)}:{node.lineno}: {room} imports {top}"


def test_no_name_is_undefined():
    """The linter mistakes shapes like "B" for names, so its rule is off. This test applies the rule without shapes."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "."]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
    names = {re.findall(r"`(\w+)`", row["message"])[0]: f"{row['filename']}:{row['location']['row']}" for row in found}
    shapes = {name for name in names if len(name) == 1} | {"words"}
    assert not {name: place for name, place in names.items() if name not in shapes}


def test_decoding_imports_without_training_dependencies():
    """GPU machines may lack grain, sentencepiece and orbax."""
    code = """
import importlib, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("grain", "sentencepiece", "orbax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
for room in ("sharding", "model", "decode", "pallas_kernels"):
    for file in sorted(Path(room).rglob("*.py")):
        if file.name not in ("__main__.py", "bench.py", "check.py"):
            importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("room", ["train", "decode", "experiments"])
def test_no_function_is_longer_than_60_lines(room):
    for file in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{file.relative_to(ROOT)}: {node.name} has {lines} lines"
