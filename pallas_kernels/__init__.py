"""Kernels, one folder per operation.

Each folder holds __init__.py (the API), reference.py (the formula in plain JAX), the kernels by device (tpu.py,
triton.py, ...), shapes.py (the calls that tests, check and benchmark share) and bench.py. It imports only jax.
"""
