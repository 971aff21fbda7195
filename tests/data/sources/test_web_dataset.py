import io
import json
import pickle
import tarfile

import pytest
import webdataset

from openkeye.common.checks import InputError
from openkeye.data.sources.web_dataset import TarShards
from tests.data.sources.media import flat, picture_bytes, seen, write_clip


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4").read_bytes()


def chat(question, answer="Yes.", **fields):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def write_shard(path, *samples):
    """With the library's own writer."""
    with webdataset.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:04}", **sample})
    return path


def test_media_are_read_where_they_lie(tmp_path, video):
    by_name = chat("<video>\nRed <image>?", videos=["0000.mp4"], images=["0000.png"])
    by_ending = chat([{"type": "image", "image": "left.png"}, {"type": "image", "image": "png"}, {"type": "text", "text": "?"}])
    write_shard(
        tmp_path / "a-000.tar",
        {"json": by_name, "mp4": video, "png": picture_bytes()},
        {"json": by_ending, "left.png": picture_bytes((0, 250, 0)), "png": picture_bytes()},
    )
    write_shard(tmp_path / "a-001.tar", {"json": chat("All?"), "mp4": video, "png": picture_bytes()}, {"json": chat("Text?")})
    source = pickle.loads(pickle.dumps(TarShards(tmp_path)))
    assert source.num_samples == 4
    samples = [source.read(index) for index in (3, 1, 0, 2)]
    assert [sample.name for sample in samples] == [
        "a-001.tar:0001", "a-000.tar:0001", "a-000.tar:0000", "a-001.tar:0000"
    ]  # fmt: skip
    assert flat(samples[0]) == [("user", "text", "Text?"), ("assistant", "text", "Yes.")]
    assert [part[2] for part in flat(samples[1])[:2]] == [picture_bytes((0, 250, 0)), picture_bytes()]
    assert flat(samples[2])[0] == ("user", "video", video)
    assert [part[1] for part in flat(samples[3])] == ["image", "video", "text", "text"]
    assert [seen(sample)[1] for sample in samples] == [0, 2, 5, 5]


def test_pictures_with_captions_and_a_pattern_of_shards(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"c-{number}.tar", {"txt": f"Circle {number}.", "png": picture_bytes()})
    source = TarShards(tmp_path / "c-{0..1}.tar", question="What is it?")
    assert source.num_samples == 2
    assert flat(source.read(1)) == [
        ("user", "image", picture_bytes()),
        ("user", "text", "What is it?"),
        ("assistant", "text", "Circle 1."),
    ]
    with pytest.raises(InputError, match=r"c-3.tar: no such file"):
        TarShards(tmp_path / "c-{2..3}.tar")


def test_bad_samples_spoil_themselves_alone(tmp_path):
    source = TarShards(
        write_shard(
            tmp_path / "b.tar",
            {"json": b'{"messages": ['},
            {"json": chat("<image>", images=["0009.png"]), "png": picture_bytes()},
            {"png": picture_bytes()},
            {"json": chat("fine")},
        )
    )
    for index, words in enumerate(("not valid JSON", "no member 0009.png among its json, png", "only png; a sample needs")):
        with pytest.raises(InputError, match=f"b.tar:000{index}: .*{words}"):
            source.read(index)
    assert flat(source.read(3))[0][2] == "fine"


def test_damaged_shards_are_told_at_opening(tmp_path):
    whole = write_shard(tmp_path / "w.tar", *({"json": chat(str(number)), "png": picture_bytes()} for number in range(4)))
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        bounds = [member.offset for member in tar]
    for size in (bounds[-1] + 700, bounds[-1] + 100, bounds[-1]):
        (tmp_path / "cut.tar").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut.tar: (cut off|not a whole tar)"):
            TarShards(tmp_path / "cut.tar")
    for name, damaged in (("none.tar", b"no tar at all" * 99), ("empty.tar", b"")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}: "):
            TarShards(tmp_path / name)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(whole, "0.json")
    (tmp_path / "packed.tar").write_bytes(packed.getvalue())
    with pytest.raises(InputError, match=r"packed.tar: not a whole tar file .*unpack it"):
        TarShards(tmp_path / "packed.tar")
    source = TarShards(whole)
    whole.write_bytes(content[:2000])
    with pytest.raises(InputError, match=r"w.tar:0003: .*shorter"):
        source.read(3)


def test_two_members_of_one_name_are_told(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("0.json")
            content = json.dumps(chat("x")).encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"twice.tar: two members 0.json"):
        TarShards(tmp_path / "twice.tar")
