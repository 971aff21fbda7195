"""Bodies that a server must refuse, in tables: (name, body or a maker of it, what the reason says)."""

import base64
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.apps.server_process import DEMO, MODEL, QUESTION, question
from tests.inputs import broken_media

Body = dict[str, Any] | str | bytes
Case = tuple[str, Body | Callable[[], Body], str]

OUTSIDE = "no such file below the media folder"
PRIVATE = "not public"


def message(content: object, **more: object) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content, **more}]}


def video_of(address: object, **options: object) -> dict[str, Any]:
    return message([{"type": "video_url", "video_url": {"url": address, **options}}, {"type": "text", "text": QUESTION}])


def picture_of(address: object, **options: object) -> dict[str, Any]:
    return message([{"type": "image_url", "image_url": {"url": address, **options}}])


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def all_cases() -> list[Case]:
    """Every case under a name of its own."""
    groups = (texts, cut_off_bodies, wrong_fields, wrong_messages, wrong_options, paths, private_addresses, addresses)
    groups += (data_urls, damaged_pictures, damaged_videos, bombs, too_much)
    cases = [(f"{group.__name__}: {name}", body, reason) for group in groups for name, body, reason in group()]
    assert len({name for name, _, _ in cases}) == len(cases)
    return cases


def texts() -> Iterator[Case]:
    """Bodies that are no JSON object."""
    for text in (
        "",
        "null",
        "true",
        "7",
        '"hello"',
        "[1, 2]",
        "{",
        "{]",
        "{'model': 1}",
        '{"model": 1,}',
        "model=x&messages=y",
    ):
        yield repr(text), text, "JSON|object"
    whole = json.dumps(question())
    yield "two documents", whole + whole, "JSON"
    yield "a comment", "// hello\n" + whole, "JSON"
    yield "a byte order mark", b"\xef\xbb\xbf" + whole.encode(), "JSON"
    yield "UTF-16", whole.encode("utf-16"), "JSON"
    yield "Latin-1", '{"model": "é"}'.encode("latin-1"), "JSON"
    yield "zeros", bytes(1000), "JSON"
    yield "noise", random.Random(1).randbytes(1000), "JSON"
    yield "half a character", '{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "JSON"
    for opening in ("[", '{"a":', '[{"a":'):
        yield f"{opening} without end", opening * 100_000, "JSON"
    yield "a deep table", '{"model":' * 500 + "1" + "}" * 500, "JSON|model"
    yield "not a number", whole[:-1] + ', "temperature": NaN}', "temperature"
    yield "infinite", whole[:-1] + ', "top_p": Infinity}', "top_p"
    yield "a number of 5000 digits", whole[:-1] + f', "max_tokens": {"9" * 5000}}}', "max_tokens|JSON"


def cut_off_bodies() -> Iterator[Case]:
    whole = json.dumps(question(stream=True, max_tokens=5))
    for size in range(1, len(whole), len(whole) // 12):
        yield f"{size} bytes", whole[:size], "JSON"


WRONG_FIELDS: dict[str, tuple[object, ...]] = {
    "model": (7, None, [], {}, True),
    "messages": ("hello", None, {}, [], ["hello"], [None], [[]], 7),
    "max_tokens": ("ten", 1.5, [], True, 0, -1, 10**12),
    "max_completion_tokens": ("ten", 0, 4097, {}),
    "temperature": ("hot", -1, 2.1, [], True),
    "top_p": (0, 1.1, "x", -1),
    "top_k": (-1, 10**9, 1.5, "x"),
    "seed": (2**64, "x", 1.5, -(2**64)),
    "stop": (7, "", [""], ["x"] * 17, {}, [7]),
    "logprobs": (3, "yes"),
    "top_logprobs": (3, -1, "x"),
    "stream": ("yes", 1, []),
    "evidence": ("yes", 1, {}),
    "stream_options": ({"include_usage": True}, [], "x", {"include_usage": 1}, {"more": True}),
    "n": (2, 0, "1", 1.5),
    "logit_bias": ({"1": 5}, [], "x"),
    "frequency_penalty": (0.5, "x"),
    "presence_penalty": (-0.5, []),
    "response_format": ({"type": "json_object"}, {}, "text", {"type": "text", "more": 1}),
    "modalities": (["audio"], "text", [7]),
    "tool_choice": ("required", {"type": "function", "function": {"name": "f"}}, 7),
    "tools": (
        {},
        [7],
        [{"type": "function"}],
        [{"type": "code", "function": {"name": "f"}}],
        [{"type": "function", "function": {}}],
        [{"type": "function", "function": {"name": 7}}],
        [{"type": "function", "function": {"name": "f", "parameters": []}}],
        [{"type": "function", "function": {"name": "f", "strict": True}}],
        [{"type": "function", "function": {"name": "f"}}],
    ),
    "user": (7, []),
    "metadata": ("x",),
    "store": ("x",),
    "temprature": (1,),
    "messages ": ([],),
    "functions": ([],),
    "__proto__": ({},),
}


def wrong_fields() -> Iterator[Case]:
    """One field at fault, the others right."""
    for field, values in WRONG_FIELDS.items():
        for number, value in enumerate(values):
            yield f"{field} {number}", question(**{field: value}), field.strip()
    yield "no model", {"messages": question()["messages"]}, "model: Field required"
    yield "no messages", {"model": MODEL}, "messages: Field required"
    yield "two lengths", question(max_tokens=5, max_completion_tokens=6), "differ"
    yield "many likely tokens", question(logprobs=True, top_logprobs=21), "top_logprobs"


def wrong_messages() -> Iterator[Case]:
    place = "messages.0."
    for role in ("king", "", "User", None, 7):
        yield f"role {role!r}", message("x", role=role), f"{place}role"
    for content in (7, {}, True, [7], [[]], [None], ["x"]):
        yield f"content {content!r}", message(content), f"{place}content"
    parts = [
        {},
        {"type": "smell", "smell": "rose"},
        {"type": "text"},
        {"type": "text", "text": 7},
        {"type": "text", "text": "x", "more": 1},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video_url"},
        {"type": "video_url", "video_url": 7},
        {"type": "video_url", "video_url": {}},
        {"type": "video_url", "video_url": {"url": None}},
        {"type": "image_url", "image_url": ["x"]},
        {"type": "image_url", "image_url": {"url": "x", "detail": 7}},
    ]
    for number, part in enumerate(parts):
        yield f"part {number}", message([part]), f"{place}content.0"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    wrong_calls = [call | {"type": "code"}, call | {"function": {"name": "f"}}, call | {"function": 7}, call | {"more": 1}]
    for number, wrong in enumerate([7, *wrong_calls]):
        yield f"call {number}", message("x", role="assistant", tool_calls=[wrong]), f"{place}tool_calls.0"
    broken = call | {"function": {"name": "f", "arguments": "{"}}
    yield "arguments", message("x", role="assistant", tool_calls=[broken]), "arguments of f are not JSON"
    for field, value in (("name", 7), ("tool_call_id", 7), ("reasoning_content", []), ("refusal", "no"), ("weight", 1)):
        yield field, message("x", **{field: value}), f"{place}{field}"


def wrong_options() -> Iterator[Case]:
    wrong: dict[str, tuple[object, ...]] = {
        "fps": (-1, 0, True, "fast", [1], {}),
        "start": (99, -1, "x", 1e300),
        "end": (0, -5, "x"),
        "budget": (-5, 0, 1.5, "x"),
        "num_frames": ([3], 0, -1, "x"),
        "min_frames": (0, "x"),
        "max_frames": (-3, "x"),
        "min_pixels": (-1, "x"),
        "max_pixels": (-1, 0, "x"),
        "total_pixels": (0, "x", 1e300),
        "adaptive": ("x", 7),
        "smell": ("rose",),
        "preprocess_kwargs": ("x", [1], {"smell": 1}),
    }
    for name, values in wrong.items():
        for value in values:
            reason = r"smell|preprocess_kwargs" if name == "preprocess_kwargs" else f"{name}|total_|budget|limits|outside|after"
            yield f"{name} {value!r}", video_of("demo.mp4", **{name: value}), reason
    yield "end before start", video_of("demo.mp4", start=5, end=4), "not after start"
    red = data_url("image/png", broken_media.png(8, 8))
    for name, value in (("min_pixels", -5), ("max_pixels", -5), ("fps", 2), ("smell", 1), ("max_pixels", "x")):
        yield f"of a picture: {name} {value}", picture_of(red, **{name: value}), f"{name}|limits|smell"
    yield (
        "a picture of 10^15 pixels",
        picture_of(data_url("image/png", broken_media.png(8, 8)), min_pixels=10**15),
        "context holds",
    )


def paths() -> Iterator[Case]:
    """The media folder is `media`; beside it lies `secret.mp4`."""
    outside = [
        "../secret.mp4",
        "below/../../secret.mp4",
        "./../secret.mp4",
        "..//secret.mp4",
        "below/../below/../../secret.mp4",
        "../" * 40 + "etc/passwd",
        "/etc/passwd",
        "//etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/stdin",
        "link.mp4",
        "up/secret.mp4",
        "up",
        "loop.mp4",
        "pipe.mp4",
        "below",
        "nothing.mp4",
        "",
        ".",
        "..",
        "..\\secret.mp4",
        "\\..\\secret.mp4",
        "..%2fsecret.mp4",
        "%2e%2e/secret.mp4",
        "..%252fsecret.mp4",
        "..\uff0fsecret.mp4",
        "\u2025/secret.mp4",
        "~/secret.mp4",
        "$HOME/secret.mp4",
        "demo.mp4/../../secret.mp4",
        "DEMO.MP4",
        " demo.mp4",
        "C:\\demo.mp4",
        "\\\\host\\demo.mp4",
        "file:///etc/passwd",
        "file:///%2e%2e/etc/passwd",
        "file://localhost/etc/passwd",
        "file:../secret.mp4",
        "FILE:///etc/passwd",
        "file:///dev/zero",
        "concat:demo.mp4|demo.mp4",
        "subfile,,start,0,end,9,,:demo.mp4",
        "crypto:demo.mp4",
        "pipe:0",
        "fd:0",
        "cache:demo.mp4",
    ]
    for address in outside:
        yield f"{address[:60]}", video_of(address), OUTSIDE
        # (pictures go the same way; one spelling in four is enough)
    for address in outside[::4]:
        yield f"picture {address[:60]}", picture_of(address), OUTSIDE
    yield "a zero byte", video_of("demo.mp4\x00.png"), "not a path"
    yield "a zero byte before", video_of("\x00demo.mp4"), "not a path"
    yield "a zero byte in a URL", video_of("file:///%00etc"), "not a path"
    yield "a long name", video_of("x" * 5000), "not a path"
    yield "another machine", video_of("file://elsewhere/demo.mp4"), "another machine"
    yield "text as a video", video_of("words.txt"), "words.txt: not a readable video"
    yield "text as a picture", picture_of("words.txt"), "words.txt: not a picture"
    yield "a playlist", video_of("list.m3u8"), "list.m3u8: "
    yield "a list of files", video_of("list.ffconcat"), "list.ffconcat: "
    yield "an empty file", video_of("empty.mp4"), "empty.mp4: an empty file"
    yield "a video as a picture", picture_of("demo.mp4"), "demo.mp4: not a picture"


def private_addresses() -> Iterator[Case]:
    hosts = [
        "127.0.0.1",
        "127.1",
        "127.255.255.254",
        "0",
        "0.0.0.0",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "LOCALHOST",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:10.0.0.1]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd12:3456::1]",
        "[ff02::1]",
        "[2002:7f00:1::]",
        "[64:ff9b::7f00:1]",
        "[2001:db8::1]",
        "\uff11\uff12\uff17.0.0.1",
        "127\u30020\u30020\u30021",
    ]
    for host in hosts:
        yield host, video_of(f"http://{host}/x.mp4"), PRIVATE + "|no address"
    for host in hosts[::5]:
        yield f"picture {host}", picture_of(f"https://{host}:443/latest/meta-data"), PRIVATE + "|no address"


def addresses() -> Iterator[Case]:
    for address, reason in (
        ("http://me:word@8.8.8.8/x.mp4", "only that is fetched"),
        ("http://8.8.8.8@127.0.0.1/x.mp4", "only that is fetched"),
        ("http://8.8.8.8:22/x.mp4", "port 22"),
        ("http://8.8.8.8:0/x.mp4", "port 0"),
        ("http://8.8.8.8:99999/x.mp4", "not an address"),
        ("http://8.8.8.8:x/x.mp4", "not an address"),
        ("http://[::1/x.mp4", "not an address"),
        ("http:///x.mp4", "only that is fetched"),
        ("http://", "only that is fetched"),
        ("http:127.0.0.1", "only that is fetched"),
        ("https:\\\\127.0.0.1\\x", "only that is fetched"),
        ("http://no-such-host.invalid/x.mp4", "has no address"),
        (f"http://{'a' * 300}.com/x", "has no address|not an address"),
        ("http://.../x", "has no address|not an address"),
        ("HTTP://localhost/x.mp4", PRIVATE),
        ("rtsp://example.org/x", "not served"),
        ("ftp://example.org/x", "not served"),
        ("gopher://127.0.0.1/x", "not served"),
        ("s3://bucket/x", "not served"),
        ("tcp://127.0.0.1:22", "not served"),
        ("unix:///run/x", "not served"),
    ):
        yield address[:60], video_of(address), reason


def data_urls() -> Iterator[Case]:
    """Kinds of damage in the address itself."""
    whole = data_url("video/mp4", DEMO.read_bytes()[:3000])
    for name, address, reason in (
        ("no comma", "data:video/mp4", "comma"),
        ("nothing behind it", "data:", "comma"),
        ("empty", "data:video/mp4;base64,", "0 bytes"),
        ("empty and plain", "data:,", "0 bytes"),
        ("other letters", "data:video/mp4;base64,@@@@", "base64"),
        ("wrong length", "data:video/mp4;base64,AAAAA", "base64"),
        ("one letter", "data:video/mp4;base64,A", "base64"),
        ("padding inside", "data:video/mp4;base64,AA==AAAA", "base64"),
        ("only padding", "data:video/mp4;base64,====", "base64"),
        ("spaces", whole.replace("AAAA", "AA AA", 1), "base64"),
        ("a cut", whole[:-1], "base64"),
        ("the alphabet of URLs", "data:video/mp4;base64,_-_-", "base64"),
        ("other characters", "data:video/mp4;base64,\u00e9\u00e9\u00e9\u00e9", "base64"),
        ("not encoded", "data:video/mp4,hello", "not a readable video"),
        ("another encoding", "data:video/mp4;base32,MFRGG===", "not a readable video"),
        ("capitals", "DATA:video/mp4;base64,@@@@", "base64"),
        ("an address within", "data:video/mp4,http://127.0.0.1/x", "not a readable video"),
    ):
        yield name, video_of(address), reason
    for name, address, reason in (
        ("empty picture", "data:image/png;base64,", "0 bytes"),
        ("picture of letters", "data:image/png;base64,@@@@", "base64"),
        ("picture without a comma", "data:image/png;base64", "comma"),
        ("drawing", "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        ("program", "data:image/eps,%25!PS-Adobe-3.0 EPSF-3.0%0A%25%25BoundingBox: 0 0 9 9%0Ashowpage", "not a picture"),
    ):
        yield name, picture_of(address), reason


def damaged_pictures() -> Iterator[Case]:
    for kind, name in broken_media.PICTURE_KINDS.items():
        whole = broken_media.picture(kind)
        cuts = {"header": whole[:10], "half": whole[: len(whole) // 2], "the end": whole[:-40]}
        for what, content in cuts.items():
            yield f"{kind}: {what}", picture_of(data_url(name, content)), "not a picture|damaged"
        noise = random.Random(2).randbytes(len(whole))
        yield f"{kind}: noise", picture_of(data_url(name, whole[:8] + noise)), "not a picture|damaged|pixels"
    yield "a video", picture_of(data_url("image/png", DEMO.read_bytes()[:2000])), "not a picture"
    yield "a text", picture_of(data_url("image/png", b"hello" * 99)), "not a picture"
    yield "no pixels", picture_of(data_url("image/png", broken_media.png(0, 0))), "not a picture|damaged|pixels"
    yield "a strip", picture_of(data_url("image/png", broken_media.picture("png", 4000, 10))), "200 times"


def damaged_videos() -> Iterator[Case]:
    for container in broken_media.VIDEO_CODECS:
        whole = broken_media.video(container)
        for size in (20, 100, 300):
            body = video_of(data_url(f"video/{container}", whole[:size]))
            yield f"{container}: {size} bytes", body, "not a readable video|without frames|no stream|no moving picture"
        noise = random.Random(3).randbytes(3000)
        body = video_of(data_url(f"video/{container}", whole[:40] + noise))
        yield f"{container}: noise", body, "not a readable video|without frames|no stream|can be decoded"
    cut = DEMO.read_bytes()[:2000]
    yield "no index", video_of(data_url("video/mp4", cut)), "not a readable video"
    yield "a picture", video_of(data_url("video/mp4", broken_media.picture("png"))), "a picture .*pass it as an image"
    yield "a text", video_of(data_url("video/mp4", b"garbage" * 99)), "not a readable video"
    playlist = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n"
    yield "a playlist", video_of(data_url("video/mp4", playlist)), "not a readable video|a playlist"
    yield (
        "a list of files",
        video_of(data_url("video/mp4", b"ffconcat version 1.0\nfile /etc/passwd\n")),
        "not a readable video",
    )


def bombs() -> Iterator[Case]:
    """Small files that stand for large ones. Made only when they are sent."""

    def as_picture(make: Callable[..., bytes], *arguments: int) -> Callable[[], Body]:
        return lambda: picture_of(data_url("image/png", make(*arguments)))

    def as_video(make: Callable[..., bytes], *arguments: int) -> Callable[[], Body]:
        return lambda: video_of(data_url("video/mp4", make(*arguments)))

    pixels = "pixels"
    for side in (60_000, 65_535, 2**31 - 1):
        yield f"png of {side}", as_picture(broken_media.png, side, side), pixels + "|damaged|not a picture"
    yield "png, wide", as_picture(broken_media.png, 2_000_000, 9_000), pixels
    yield "png that inflates", as_picture(broken_media.inflating_png, 12_000), pixels
    yield "png that inflates more", as_picture(broken_media.inflating_png, 30_000), pixels
    yield "png with a long text", as_picture(broken_media.chatty_png), "too large"
    for width, height in ((65_535, 65_535), (20_000, 20_000), (65_500, 3_000)):
        yield f"jpeg of {width}x{height}", as_picture(broken_media.resized_jpeg, width, height), pixels
        yield f"gif of {width}x{height}", as_picture(broken_media.gif, width, height, 3), pixels
    yield "webp", as_picture(broken_media.resized_webp, 16_384, 16_384), pixels
    yield "bmp", as_picture(broken_media.resized_bmp, 100_000, 100_000), pixels
    yield "bmp upside down", as_picture(broken_media.resized_bmp, 100_000, -100_000), pixels
    yield "gif of 20,000 frames", as_video(broken_media.gif, 6_000, 6_000, 20_000), "no recording is so small"
    yield "gif of 40,000 smaller frames", as_video(broken_media.gif, 3_000, 3_000, 40_000), "no recording is so small"
    yield "gif of 65,535 x 65,535", as_video(broken_media.gif, 65_535, 65_535, 3), "can be decoded|pixels"
    yield "webm that repeats a picture", as_video(broken_media.repeating_vp9, 2_048, 20_000), "no recording is so small"
    yield "avi whose frames grow", as_video(broken_media.growing_avi, 16_000), "can be decoded"
    for number in (5_000_000, 100_000_000, 2**32 - 1):
        yield f"mp4 of {number} frames", as_video(broken_media.endless_mp4, number), "its index states"
        yield f"fragment of {number} frames", as_video(broken_media.endless_fragment, number), "its index states"
    yield "mp4 with a packed index", as_video(broken_media.packed_index_mp4), "index is compressed"


def too_much() -> Iterator[Case]:
    """Requests that no context holds."""
    holds = "the context holds 32,768"
    yield "words", message("word " * 40_000), holds
    yield "turns", {"model": MODEL, "messages": [{"role": "user", "content": "x " * 40}] * 2_000}, holds
    red = data_url("image/png", broken_media.png(8, 8))
    part = {"type": "image_url", "image_url": {"url": red}}
    yield "pictures", message([part] * 2_100), holds
    yield "parts", message([{"type": "text", "text": "word " * 4}] * 15_000), holds
    clip = {"type": "video_url", "video_url": {"url": "demo.mp4"}}
    yield "many pictures", message([part | {"image_url": "a.png"}] * 4_097), "4,097 parts of type image_url; give at most 4,096"
    yield "many videos", message([clip] * 65), "65 parts of type video_url; give at most 64"
