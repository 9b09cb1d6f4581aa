"""The kinds of tokenizers; `data.tokenizer` is the door."""
