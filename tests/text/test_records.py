"""Chats as datasets have them: roles by any name, contents in parts, calls of tools; what is no text is refused."""

from __future__ import annotations

import pytest

from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.text.records import record_text

USER = {"role": "user", "content": "Hi"}


def written(*messages):
    return record_text({"messages": list(messages)}, "a.jsonl:7", field=None, tokenizer=byte_tokenizer())


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("USER", "user"), ("gpt", "assistant"), ("ChatGPT", "assistant"), ("Critic", "Critic")],
)
def test_roles_are_those_of_templates(name, role):
    assert written({"from": name, "value": "x"}) == written({"role": name, "content": "x"}) == turn(role, "x")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a", "image_url": None}, {"text": "b"}, "c"], "abc"),
        ([{"type": "input_text", "text": "a"}], "a"),
        ([], ""),
        (None, ""),
    ],
)
def test_text_parts_are_joined(content, text):
    assert written({"role": "user", "content": content}) == turn("user", text)


def test_a_call_of_a_tool_has_no_content():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    assert written(USER, call) == written(USER, {**call, "content": None}) == turn("user", "Hi") + turn("assistant", "")


def test_a_chat_without_messages_is_empty_text():
    assert written() == ""


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "a part of type 'text'"),
        ({"role": "user", "content": [7]}, "holds int, expected parts of text"),
        ({"role": "user", "content": 7}, "content of a chat message is int, expected text"),
        ({"role": "user", "content": {"a": 1}}, "content of a chat message is dict"),
        ({"from": ["human"], "value": "x"}, "role of a chat message is list, expected text"),
        ({"role": None, "content": "x"}, "has content, expected role and content"),
        ({"role": "user"}, "has role, expected role and content"),
    ],
)
def test_what_is_no_text_is_refused_by_row(message, reason):
    with pytest.raises(ValueError, match=f"^a.jsonl:7: .*{reason}"):
        written(USER, message)


def test_errors_of_a_template_name_the_row():
    strict = byte_tokenizer()
    strict.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(ValueError, match=r"^a.jsonl:7: .*template rejects this chat: can only concatenate"):
        record_text({"messages": [USER]}, "a.jsonl:7", field=None, tokenizer=strict)
