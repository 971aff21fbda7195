"""Replies are taken apart as the server does it, and what cannot be read is told."""

from openkeye.agents.reply_parser import parse_reply

CALL = '<tool_call>\n{"name": "find", "arguments": {"what": "star"}}\n</tool_call>'


def test_reasoning_text_and_calls_are_told_apart():
    reply = parse_reply(f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}", first_call=3)
    assert (reply.reasoning, reply.text, reply.malformed) == ("Hm.", "I look.", ())
    assert [call["id"] for call in reply.tool_calls] == ["call_3", "call_4"] and reply.finish_reason == "tool_calls"
    assert reply.tool_calls[0]["name"] == "find" and reply.tool_calls[0]["arguments"] == {"what": "star"}
    assert parse_reply(CALL) == parse_reply(CALL)


def test_what_is_no_call_is_malformed():
    for text in (
        "<tool_call>find!</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "find", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "find", "arguments": "not json"}</tool_call>',
        '<tool_call>{"name": "find"',
        f"<tool_call>{'[' * 100000}</tool_call>",
    ):
        reply = parse_reply(text)
        assert not reply.tool_calls and len(reply.malformed) == 1 and reply.finish_reason == "stop", text[:60]
    assert parse_reply("Three <b>stars</b>.").malformed == () and parse_reply("x", "length").finish_reason == "length"
    assert parse_reply(CALL, "length").finish_reason == "length"
