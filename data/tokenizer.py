"""Tokenizers, whatever their kind: ours (SentencePiece BPE, bytes) and those that models are published with.

The kinds are in data/tokenizers: trained (ours), huggingface (tokenizer.json), ranks (tiktoken), sentencepieces
(others' SentencePiece models). Published kinds need the extra `hf`; nothing is imported before it is needed.
"""

from data.tokenizers.fit import fit_vocabulary
from data.tokenizers.folders import load_tokenizer, read_tokenizer, saved_tokenizer, special_tokens
from data.tokenizers.protocol import SpecialTokens, Stream, Tokenizer, byte_lengths, check_vocabulary, prompt_ids
from data.tokenizers.publish import special_ids, write_published
from data.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer, train_tokenizer

__all__ = [
    "ByteTokenizer",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "Stream",
    "Tokenizer",
    "byte_lengths",
    "check_vocabulary",
    "fit_vocabulary",
    "load_tokenizer",
    "prompt_ids",
    "read_tokenizer",
    "saved_tokenizer",
    "special_ids",
    "special_tokens",
    "train_tokenizer",
    "write_published",
]
