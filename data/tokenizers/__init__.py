"""Implementations of tokenizers. Import them through `data.tokenizer`."""
