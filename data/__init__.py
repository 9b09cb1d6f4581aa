"""Corpora, tokenizers, packed windows on disk, and the stream of training batches."""
