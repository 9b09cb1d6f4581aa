"""The memory of preparing and reading data does not grow with the text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.peers import ROOT

PROGRAM = """
import itertools, json, sys
from pathlib import Path
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.pipeline import heldout_windows, train_batches
from data.prepare import prepare
from experiments.bench.data import peak_bytes

folder = Path(sys.argv[1])
config = DataConfig(
    sources=(SourceConfig(name="s", path=str(folder / "text"), include=("*.jsonl",), kind="jsonl"),),
    tokenizer=TokenizerConfig(kind="byte"), sequence_length=256, cache_dir=str(folder / "cache"), holdout_fraction=0.1,
)
prepared = prepare(config, keep_bytes=2**22, section_bytes=2**22)
assert prepare(config, keep_bytes=2**22, section_bytes=2**22).identity == prepared.identity
with train_batches(prepared, config) as stream:
    for batch in itertools.islice(stream, 300):
        pass
for batch in heldout_windows(prepared, "s", batch_size=64):
    pass
print(json.dumps([peak_bytes(), prepared.counts("s").train_bytes]))
"""


def peak(folder: Path, size: int) -> tuple[int, int]:
    """Prepare and read `size` bytes of text in a process. Return its peak of memory and the bytes of training text."""
    from experiments.bench.data import write_text

    write_text(folder / "text", size, compress=False)
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_the_peak_of_memory_does_not_grow_with_the_text(tmp_path):
    """Text, tokens and windows are 9 times the growth of the text, which is 54 MB. A document's row has 56 bytes."""
    (few, few_bytes), (many, many_bytes) = (peak(tmp_path / str(size), size) for size in (20_000_000, 80_000_000))
    assert many_bytes - few_bytes > 50_000_000
    assert many - few < 12_000_000
