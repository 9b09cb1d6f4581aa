"""After `keep_freed_memory`, large blocks that are freed and allocated again cause no page faults."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from train.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (256 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(mode: str) -> int:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs mallopt of glibc")
def test_kept_memory_avoids_page_faults_of_a_second_allocation():
    assert _faults("keep") < 100 < _faults("plain")
