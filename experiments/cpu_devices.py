"""Training on CPUs: one simulated device for each core, so that small matmuls are not split across cores."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, MutableMapping

from experiments import ACCELERATORS
from train.config import Experiment
from train.records import RunFolder

COUNT_FLAG = "--xla_force_host_platform_device_count"
# With a device for each core, a matmul runs on one thread: several would compete with those of the other devices.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def start_devices(
    experiment: Experiment,
    run: RunFolder | None = None,
    *,
    training: bool = True,
    log: Callable[[str], None] = print,
) -> int:
    """Start JAX's backend and return its number of devices.

    On a CPU, simulate one device for each core, as far as the experiment's mesh and batch allow, unless the environment
    chooses a count. A run that was trained on fewer devices than there are cores keeps its count, because the sums of
    another count differ in the last bits.
    """
    recorded = None if run is None else recorded_devices(run)
    if _simulated(os.environ):
        use_devices(os.environ, best_count(experiment, cores(), recorded, training=training))
    import jax

    count = jax.device_count()
    if recorded is not None and recorded != count and training:
        log(
            f"note: this run was trained on {recorded} devices and continues on {count}: sums are added in another "
            "order, so its losses may differ in the last bits from those of an uninterrupted run"
        )
    return count


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_count(experiment: Experiment, most: int, recorded: int | None = None, *, training: bool = True) -> int:
    """Return the largest number of devices, at most `most`, that the mesh and the batch of `experiment` divide over;
    `recorded` instead where that is one of them. 1 if none is."""
    counts = [n for n in range(most, 0, -1) if _fits(experiment, n, training)]
    return recorded if recorded in counts else next(iter(counts), 1)


def _fits(experiment: Experiment, count: int, training: bool) -> bool:
    try:
        experiment.validate(count, training=training)
    except ValueError:
        return False
    return True


def _simulated(environ: MutableMapping[str, str]) -> bool:
    """Return whether JAX will run on the CPU and the user has not chosen a number of devices."""
    platforms = environ.get("JAX_PLATFORMS")
    cpu = platforms == "cpu" if platforms else not any(map(glob.glob, ACCELERATORS))
    return cpu and COUNT_FLAG not in environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in environ


def use_devices(environ: MutableMapping[str, str], count: int) -> None:
    """Set the flags for `count` simulated devices. JAX reads them when its backend starts."""
    if count > 1:
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {COUNT_FLAG}={count} {ONE_THREAD}".strip()


def recorded_devices(run: RunFolder) -> int | None:
    """Return the number of devices on which a run was last trained; None where its records do not say."""
    try:
        devices = json.loads(run.environment.read_bytes())["devices"]
        return sum(int(count) for count in devices.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
