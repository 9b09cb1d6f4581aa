"""The tests of profile_cases.py in a separate process.

In a process that has made a topology of TPUs, as tests of kernels do, starting a trace ends in a segmentation fault
(jaxlib 0.10.2 with libtpu).
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_traces_in_a_separate_process():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/train/profile_cases.py",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout and "skipped" not in ended.stdout
