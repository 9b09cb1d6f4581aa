"""Setup that must run before jax is imported: eight CPU devices in one process, fast compilation, a compilation cache
on disk, and checked annotations."""

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
    # Together with optimization level 0, this reduces compilation of a tiny network's gradient from 7.3 to 1.8 s of CPU
    # time. Later releases lack the flag.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag.split("=")[0] not in given), given]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Cache every program, however small or fast to compile. The workers of xdist share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes into tracing and lowering. Recording no Python frames per operation, and collecting garbage
# every 50,000 new objects instead of 700, saves a tenth of the CPU time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(50_000, 50, 100)

# A shell that runs tests in the background makes them, and the programs they start, ignore SIGINT. Restore the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

checked.install()
closeness.log_margins()


@pytest.fixture(autouse=True)
def _unchecked(request):
    """Disable the checks for tests marked `unchecked`, which pass values that annotations exclude to test the error
    that users get."""
    with checked.unchecked() if request.node.get_closest_marker("unchecked") else nullcontext():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip tests that need conversions of 16-bit and 8-bit floats with `--xla_cpu_max_isa=SSE4_2`: jaxlib lacks that
    function there (INTERNAL: Failed to materialize symbols)."""
    report = yield
    if call.excinfo is not None and "--xla_cpu_max_isa=SSE4_2" in os.environ["XLA_FLAGS"]:
        if "Failed to materialize symbols" in str(call.excinfo.value):
            report.outcome, why = "skipped", "Skipped: jaxlib cannot convert small floats for SSE4.2"
            report.longrepr = (str(item.path), item.location[1], why)
    return report
