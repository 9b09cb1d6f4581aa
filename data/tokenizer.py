"""Public interface to all tokenizers: those trained here (SentencePiece BPE, bytes) and those of published models.

The kinds are in data/tokenizers: trained (this project's), huggingface (tokenizer.json), ranks (tiktoken) and
sentencepieces (published SentencePiece models). Published kinds need the extra `hf`; packages are imported when used.
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
