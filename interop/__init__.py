"""Published models in and out: Hugging Face folders (config.json, safetensors) and GGUF files.

A family (`FAMILIES`, one file each) is a table of names and a translation of config.json: the one Transformer expresses
them all. `pieces.py` says how a tensor on disk is part of a weight; `load.py` streams tensors into the shards of a mesh
and `save.py` writes them back. NumPy alone: no PyTorch.
"""
