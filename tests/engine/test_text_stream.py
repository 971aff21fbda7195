"""Text in pieces: whole characters, no stop string, nothing lost."""

import itertools

import pytest

from openkeye.engine.text_stream import TextStream
from openkeye.inputs.processor import Processor


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def stream_of(text: str | bytes, stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str]]:
    """One token a byte, up to the end or the first stop string; the pieces, the last one from `finish`."""
    stream = TextStream(decode_bytes, stop)
    pieces = []
    for token in text.encode() if isinstance(text, str) else text:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream, pieces


def test_characters_come_whole():
    _, pieces = stream_of("aé€😀b")
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀", "b"]


def test_half_a_character_at_the_end_is_told_at_the_end():
    _, pieces = stream_of("a€".encode()[:-1])
    assert pieces[:3] == ["a", "", ""] and pieces[-1] == "\ufffd"


def test_damaged_bytes_do_not_hold_back_what_follows():
    _, pieces = stream_of(b"a\xffbc")
    assert pieces == ["a", "", "\ufffdb", "c", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EN", ("END",), "one EN"),
        ("ENENEND", ("END",), "ENEN"),
        ("aab", ("aaab", "ab"), "a"),
        ("xabc", ("ab", "xabc"), "x"),
        ("xab", ("ab", "xab"), ""),
        ("end€.", ("€",), "end"),
        ("\n\nUser:", ("\nUser:",), "\n"),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text, stop, expected):
    stream, pieces = stream_of(text, stop)
    assert stream.text == expected and stream.is_stopped == (expected != text)
    told = list(itertools.accumulate(pieces))
    assert not any(string in part for part in told for string in stop)


def test_cuts_between_tokens_do_not_matter():
    text, stop = "one EN two xabcd END three", ("END", "abcd", "bc", "cde")
    expected = stream_of(text, stop)[0].text
    for size in range(1, len(text)):
        parts = [text[first : first + size] for first in range(0, len(text), size)]
        stream = TextStream(lambda ids, parts=parts: "".join(parts[i] for i in ids), stop)
        for number in range(len(parts)):
            stream.push(number)
            if stream.is_stopped:
                break
        stream.finish()
        assert stream.text == expected == "one EN two xa"


def test_what_a_stop_string_may_begin_with_is_held_back():
    _, pieces = stream_of("aENx", ("END",))
    assert pieces == ["a", "", "", "ENx", ""]


def test_pieces_of_a_real_tokenizer_are_its_text(processor: Processor):
    ids = processor.encode_text("From 5.7 to 8.3 seconds — naïve café 😀, 12:05.")
    stream = TextStream(processor.decode)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == processor.decode(ids) and len(ids) > 20


def test_long_texts_are_not_decoded_again_from_their_beginning():
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    stream = TextStream(decode)
    for token in b"abc" * 100:
        stream.push(token)
    assert longest <= 3 and stream.text == "abc" * 100
