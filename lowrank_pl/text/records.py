"""Rows of datasets as text: plain fields, and chats through the tokenizer's own template."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

__all__ = ["record_text"]

FIELDS = ("text", "content", "messages", "conversations", "conversation", "document", "body", "sentence")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def record_text(row: Any, where: str, *, field: str | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of one row: a string as it is, a list of messages as the tokenizer writes a chat.

    Args:
        row: A string, or a mapping with a field of text or of messages.
        where: File and line, for error messages.
        field: Name of the field; by default the first non-empty one of ``text``, ``content``, ``messages``, ...
        tokenizer: Tokenizer whose chat template turns messages into text.

    Returns:
        The text; empty if the field is empty.

    Raises:
        ValueError: The field is absent, holds something else than text, or holds messages without a chat template.

    >>> record_text({"id": 7, "text": "Hello."}, "a.jsonl:1", field=None, tokenizer=None)
    'Hello.'
    """
    name, value = _field(row, where, field)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return _chat(value, where, tokenizer)
    raise ValueError(f"{where}: {name} holds {type(value).__name__}, expected text or a list of chat messages")


def _field(row: Any, where: str, field: str | None) -> tuple[str, Any]:
    """Return the name, for error messages, and the value of the field that holds the text."""
    if isinstance(row, str) and field is None:
        return "the row", row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the row is {type(row).__name__}, expected an object with a field of text")
    present = [name for name in (FIELDS if field is None else (field,)) if name in row]
    # Merged datasets have every field in every row, and null where a row has no value.
    if present:
        name = next((name for name in present if row[name]), present[0])
        return f"field {name!r}", row[name]
    missing = f"no field {field!r}" if field else f"none of the fields {', '.join(FIELDS)}"
    found = ", ".join(map(str, row)) or "none"
    raise ValueError(f"{where}: the row has {missing}, but {found}: choose a field with ::field=NAME")


def _chat(messages: list[dict[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a conversation as the tokenizer's chat template writes it."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"{where}: the row is a chat, but the tokenizer has no chat template: "
            "use an instruct model's tokenizer, or choose a field of plain text with ::field=NAME"
        )
    try:
        return str(tokenizer.apply_chat_template([_message(m, where) for m in messages], tokenize=False))
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template rejects this chat: {error}") from error


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message with the keys ``role`` and ``content``; older datasets call them ``from`` and ``value``."""
    if "role" in message and "content" in message:
        return message
    if "from" in message and "value" in message:
        return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    raise ValueError(f"{where}: a chat message has {', '.join(map(str, message))}, expected role and content")
