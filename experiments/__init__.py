"""Named experiments, the command line, reports, benchmarks: what stands on top of all other rooms."""

import glob
import importlib.util
import os

# The TPU compiler (libtpu) is installed for the tests. Where there is no TPU, JAX would try it as a backend first and
# print its complaints: leave it out, unless some accelerator is there or the user has chosen.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
if importlib.util.find_spec("libtpu") is not None and not any(map(glob.glob, ACCELERATORS)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
