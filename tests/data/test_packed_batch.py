"""A packed batch against its documents, token by token."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from openkeye.data.document import Document, PixelPictures
from openkeye.data.packed_batch import NO_LABEL, DocumentSpan, labels_of, pack
from openkeye.inputs.patches import Patches, patches_from_pixels

PATCH = 14


def document(
    name: str, ids: list[int], learnt: list[int], media: list[int] = (), branches: tuple[int, ...] = (), **more
) -> Document:
    """learnt and media: places."""
    length = len(ids)
    places = torch.arange(length)
    return Document(
        name=name,
        input_ids=torch.tensor(ids),
        position_ids=torch.stack([places, places * 2, places * 3]),
        is_learnt=torch.isin(places, torch.tensor(learnt, dtype=torch.int64)),
        is_media=torch.isin(places, torch.tensor(media, dtype=torch.int64)),
        branches=branches,
        **more,
    )


def pixels(seed: int, num: int, height: int = 2, width: int = 2) -> np.ndarray:
    """Pictures of so many patches."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (num, height * PATCH, width * PATCH, 3), dtype=np.uint8)


@dataclass(frozen=True)
class AskedPictures:
    """Notes the devices on which it is drawn."""

    inner: PixelPictures
    devices: list[str]

    @property
    def num_pictures(self) -> int:
        return self.inner.num_pictures

    def patches(self, device: torch.device | str) -> Patches:
        self.devices.append(str(device))
        return self.inner.patches(device)


TEXT = document("text", [10, 11, 12, 13], learnt=[2, 3], task="chat")
VIDEO = document("video", [20, 99, 99, 23, 24], [3, 4], media=[1, 2], task="video", pictures=(PixelPictures([pixels(1, 2)]),))
TREE = document("tree", [30, 31, 32, 40, 41, 42, 50, 51], learnt=[2, 3, 4, 5, 6, 7], branches=(3, 6))


def test_a_pack_is_its_documents_one_after_the_other():
    batch = pack([TEXT, VIDEO, TREE])
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 20, 99, 99, 23, 24, 30, 31, 32, 40, 41, 42, 50, 51]
    assert batch.layout.spans == (
        DocumentSpan(0, 4, (), 4),
        DocumentSpan(4, 9, (), 9),
        DocumentSpan(9, 12, (12, 15), 17),
    )
    assert batch.layout.num_tokens == batch.num_tokens == 17
    assert batch.names == ("text", "video", "tree") and batch.tasks == ("chat", "video", "")
    for span, alone in zip(batch.layout.spans, (TEXT, VIDEO, TREE), strict=True):
        assert torch.equal(batch.input_ids[span.start : span.end], alone.input_ids)
        assert torch.equal(batch.position_ids[:, span.start : span.end], alone.position_ids)
        assert torch.equal(batch.labels[span.start : span.end], labels_of(alone))
        assert span.num_tokens == alone.num_tokens


def test_a_label_is_the_next_token_of_the_same_segment_where_that_is_learnt():
    assert labels_of(TEXT).tolist() == [NO_LABEL, 12, 13, NO_LABEL]
    assert labels_of(VIDEO).tolist() == [NO_LABEL, NO_LABEL, 23, 24, NO_LABEL]
    # The trunk ends at 32, the first branch at 42; the branches' own first tokens 40 and 50 have nobody to predict them.
    assert labels_of(TREE).tolist() == [NO_LABEL, 32, NO_LABEL, 41, 42, NO_LABEL, 51, NO_LABEL]


def test_no_label_crosses_from_one_document_to_the_next():
    first, second = document("a", [1, 2], [0, 1]), document("b", [3, 4], [0, 1])
    assert pack([first, second]).labels.tolist() == [2, NO_LABEL, 4, NO_LABEL]


@pytest.mark.parametrize("documents", [[TEXT], [TREE], [TEXT, VIDEO, TREE]])
def test_learnt_tokens_are_counted_as_labels_are(documents):
    batch = pack(documents)
    assert batch.num_learnt == int((batch.labels != NO_LABEL).sum()) == sum(document.num_learnt for document in documents)


def test_media_positions_point_at_pads_and_not_at_what_looks_like_one():
    prose = document("prose", [99, 1, 99], learnt=[2])
    batch = pack([prose, VIDEO, VIDEO])
    assert batch.media_positions.tolist() == [4, 5, 9, 10]
    assert pack([prose]).media_positions.tolist() == []


def test_pictures_are_drawn_in_the_order_of_the_documents():
    first, second, third = pixels(1, 2), pixels(2, 1, 4, 2), pixels(3, 1)
    many = document("many", [99] * 4, [], [0, 1, 2, 3], pictures=(PixelPictures([second, third]),))
    drawn = pack([VIDEO, TEXT, many]).patches()
    expected = [patches_from_pixels(torch.from_numpy(part), PATCH) for part in (first, second, third)]
    assert drawn is not None
    assert torch.equal(drawn.pixels, torch.cat([part.pixels for part in expected]))
    assert pack([TEXT]).patches() is None


def test_a_batch_moves_whole_and_its_pictures_are_drawn_where_it_is():
    devices: list[str] = []
    asked = document("asked", [99, 1], [1], [0], pictures=(AskedPictures(PixelPictures([pixels(1, 1)]), devices),))
    batch = pack([TEXT, asked])
    moved = batch.to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert set(tensors) == {"input_ids", "position_ids", "labels", "learnt_positions", "media_positions"}
    assert all(value.device.type == "meta" for value in tensors.values()) and moved.device.type == "meta"
    rest = {name: value for name, value in vars(moved).items() if name not in tensors}
    assert rest == {name: vars(batch)[name] for name in rest}
    assert devices == []
    same = batch.to("cpu")
    same.patches()
    assert devices == ["cpu"]
    assert torch.equal(same.input_ids, batch.input_ids) and same.layout == batch.layout


def test_no_document_is_no_pack():
    with pytest.raises(ValueError, match="no documents"):
        pack([])


@pytest.mark.parametrize(
    ("branches", "media", "words"),
    [((0,), [], "must rise"), ((2, 2), [], "must rise"), ((4,), [], "must rise"), ((2,), [3], "stand in the trunk")],
)
def test_documents_that_cannot_be_are_refused(branches, media, words):
    with pytest.raises(ValueError, match=words):
        document("wrong", [1, 2, 3, 4], [1], media, branches)
