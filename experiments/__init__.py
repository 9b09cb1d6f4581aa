"""Named experiments, the command line, reports and benchmarks. This package may import all others."""

import glob
import importlib.util
import os

# The TPU compiler (libtpu) is installed for the tests. On a machine without a TPU, JAX would try it as a backend first
# and print warnings. Disable it unless the machine has an accelerator or the user has set JAX_PLATFORMS.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
if importlib.util.find_spec("libtpu") is not None and not any(map(glob.glob, ACCELERATORS)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
