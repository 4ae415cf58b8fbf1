"""Rows of datasets as text: plain fields, and chats through the tokenizer's own template."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["record_text"]

FIELDS = ("text", "content", "messages", "conversations", "conversation", "document", "body", "sentence")
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
}
"""The role that chat templates know, by the name that a dataset has for it, in small letters."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a message that hold text."""


def record_text(row: Any, where: str, *, field: str | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of one row: a string as it is, a list of messages as the tokenizer writes a chat.

    Args:
        row: A string, or a mapping with a field of text or of messages.
        where: File and line, for error messages.
        field: Name of the field; by default the first non-empty one of ``text``, ``content``, ``messages``, ...
        tokenizer: Tokenizer whose chat template turns messages into text.

    Returns:
        The text; empty if the field is empty or a chat without messages.

    Raises:
        ValueError: The field is absent, holds something else than text, or holds messages without a chat template; a
            message holds something else than text, such as an image. The error names ``where``.

    >>> record_text({"id": 7, "text": "Hello."}, "a.jsonl:1", field=None, tokenizer=None)
    'Hello.'
    """
    name, value = _field(row, where, field)
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
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
    chat = [_message(message, where) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # A template is a program: what it raises for an odd message is up to it.
        reason = str(error) or type(error).__name__
        raise ValueError(f"{where}: the tokenizer's chat template rejects this chat: {reason}") from error


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message with the keys ``role`` and ``content``; older datasets call them ``from`` and ``value``."""
    # Merged datasets have every key in every message, and null where a message has no value.
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    # A call of a tool may stand alone.
    if role is None or not {"content", "value", "tool_calls"} & set(message):
        raise ValueError(f"{where}: a chat message has {', '.join(map(str, given))}, expected role and content")
    if not isinstance(role, str):
        raise ValueError(f"{where}: the role of a chat message is {type(role).__name__}, expected text such as user")
    return {**given, "role": ROLES.get(role.lower(), role), "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """Return the text of a message: as it is, or that of its parts in a row."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(
            f"{where}: the content of a chat message is {type(content).__name__}, expected text or a list of text parts"
        )
    texts = []
    for part in content:
        known = isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS
        text = part.get("text") if known else part
        if not isinstance(text, str):
            what = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}: a chat message holds {what}, expected parts of text: leave such rows out")
        texts.append(text)
    return "".join(texts)
