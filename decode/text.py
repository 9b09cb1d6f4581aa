"""Text for decoding: chat prompts, and the text of generated tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from data.chat import chat_template, encode_chat
from data.tokenizer import Tokenizer


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens."""
    return tokenizer.decode([token for token in tokens if spells(tokenizer, token)])


def continued(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text that each token adds after the prompt, and finally the text of incomplete bytes.

    Decoding starts with the prompt, because some tokenizers drop a space before a text.
    """
    stream = tokenizer.stream()
    for token in prompt:
        stream.push(token)
    for token in tokens:
        yield stream.push(token) if spells(tokenizer, token) else ""
    yield stream.flush()


def chat_prompts(tokenizer: Tokenizer, texts: Sequence[str], system: str | None) -> list[list[int]]:
    """Return the ids of one chat per text, with an optional system message, the text as the user's message and the
    start of the assistant's turn. Raises DataError if the tokenizer has no chat template."""
    template, before = chat_template(tokenizer), [] if system is None else [{"role": "system", "content": system}]
    chats = [[*before, {"role": "user", "content": text}] for text in texts]
    return [encode_chat(tokenizer, template, chat, add_generation_prompt=True).tolist() for chat in chats]


def spells(tokenizer: Tokenizer, token: int) -> bool:
    """Return whether the tokenizer has this id. A model's vocabulary may be padded, and a barely trained model may
    generate the extra ids."""
    return token < tokenizer.vocab_size
