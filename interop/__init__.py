"""Read and write published models: Hugging Face folders (config.json, safetensors) and GGUF files.

Each family (`FAMILIES`, one file each) is a table of tensor names and a translation of config.json, since one
Transformer expresses them all. `tensor_map.py` maps tensors on disk to parts of weights, `load.py` streams tensors into
the shards of a mesh, and `save.py` writes them back. Everything uses NumPy; PyTorch is not needed.
"""
