"""Text in and out of decoding: prompts of chats, and the text of generated tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from data.chat import chat_template, encode_chat
from data.tokenizer import Tokenizer


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of generated tokens."""
    return tokenizer.decode([token for token in tokens if spells(tokenizer, token)])


def continued(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text that each token adds to that of the prompt, then what was left incomplete. (By itself the first token
    may be
    spelled otherwise: some tokenizers drop a space before a text.)"""
    stream = tokenizer.stream()
    for token in prompt:
        stream.push(token)
    for token in tokens:
        yield stream.push(token) if spells(tokenizer, token) else ""
    yield stream.flush()


def chat_prompts(tokenizer: Tokenizer, texts: Sequence[str], system: str | None) -> list[list[int]]:
    """Ids of chats in which a user says a text and the assistant is to speak. Raises DataError where there is no
    template."""
    template, before = chat_template(tokenizer), [] if system is None else [{"role": "system", "content": system}]
    chats = [[*before, {"role": "user", "content": text}] for text in texts]
    return [encode_chat(tokenizer, template, chat, add_generation_prompt=True).tolist() for chat in chats]


def spells(tokenizer: Tokenizer, token: int) -> bool:
    """False for the ids that round the model's vocabulary up: a model hardly trained may still draw one."""
    return token < tokenizer.vocab_size
