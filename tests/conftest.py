"""Set before jax is imported: eight CPU devices in one process, quick compilation, programs kept on disk between
runs, and annotations that are checked."""

import gc
import os
import signal
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import checked, closeness

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax-tests"

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    # With the line above: a tiny network's gradient compiles in 1.8 s of CPU time, not 7.3. Later releases lack the
    # flag.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag.split("=")[0] not in given), given]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Every program is kept, however small or quick to compile; the workers of xdist share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes into tracing and lowering: no stack of Python frames for each operation, and a collection of
# garbage for every 50,000 new objects, not 700. Together a tenth of the CPU time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(50_000, 50, 100)

# Where tests run in the background of a shell, Ctrl-C is ignored, here and in every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

checked.install()
closeness.log_margins()


@pytest.fixture(autouse=True)
def _unchecked(request):
    """Tests marked `unchecked` give values that annotations exclude, to see the error that users see."""
    with checked.unchecked() if request.node.get_closest_marker("unchecked") else nullcontext():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With `--xla_cpu_max_isa=SSE4_2` jaxlib lacks the function that converts 16-bit and 8-bit floats there
    (INTERNAL: Failed to materialize symbols): tests that need it are skipped by name."""
    report = yield
    if call.excinfo is not None and "--xla_cpu_max_isa=SSE4_2" in os.environ["XLA_FLAGS"]:
        if "Failed to materialize symbols" in str(call.excinfo.value):
            report.outcome, why = "skipped", "Skipped: jaxlib cannot convert small floats for SSE4.2"
            report.longrepr = (str(item.path), item.location[1], why)
    return report
