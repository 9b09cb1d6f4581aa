"""Kernels, one folder per operation: {__init__.py (the api), reference.py, tpu.py, gpu.py, shapes.py, bench.py}.
Imports jax alone."""
