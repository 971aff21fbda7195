import torch

from openkeye.inputs.positions import position_ids

IMAGE, VIDEO = 90, 91


def test_text_alone_counts_up_on_all_axes():
    positions = position_ids(torch.arange(5), None, None, IMAGE, VIDEO)
    assert torch.equal(positions, torch.arange(5).expand(3, 5))


def test_a_picture_takes_rows_and_columns_and_text_goes_on_after_its_longer_side():
    ids = torch.tensor([1, 2, *[IMAGE] * 6, 3, 4])
    positions = position_ids(ids, torch.tensor([[1, 4, 6]]), None, IMAGE, VIDEO)
    assert positions[:, :2].tolist() == [[0, 1]] * 3
    assert positions[:, 2:8].tolist() == [[2] * 6, [2, 2, 2, 3, 3, 3], [2, 3, 4, 2, 3, 4]]
    assert positions[:, 8:].tolist() == [[5, 6]] * 3


def test_frames_and_pictures_mix_each_with_its_own_row():
    frame, still = [VIDEO] * 2, [IMAGE] * 4
    ids = torch.tensor([7, *frame, 8, *frame, 9, *still, *frame, 5])
    positions = position_ids(ids, torch.tensor([[1, 4, 4]]), torch.tensor([[1, 2, 4]] * 3), IMAGE, VIDEO)
    assert positions[0].tolist() == [0, 1, 1, 3, 4, 4, 6, 7, 7, 7, 7, 9, 9, 11]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11]
    assert positions.dtype == torch.int64


def test_the_positions_of_the_recorded_case_are_met():
    # Recorded from an implementation that shares no code with this one: a picture of 8x6 patches, three frames of 4x6.
    frame = [VIDEO] * 6
    ids = torch.tensor([1] * 6 + [IMAGE] * 12 + [1] * 9 + frame + [1] * 3 + frame + [1] * 3 + frame + [1] * 10)
    positions = position_ids(ids, torch.tensor([[1, 8, 6]]), torch.tensor([[1, 4, 6]] * 3), IMAGE, VIDEO)
    # fmt: off
    assert positions.tolist() == [
        [
            0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 19,
            19, 19, 19, 19, 22, 23, 24, 25, 25, 25, 25, 25, 25, 28, 29, 30, 31, 31, 31, 31, 31, 31, 34, 35,
            36, 37, 38, 39, 40, 41, 42, 43
        ],
        [
            0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 19,
            19, 20, 20, 20, 22, 23, 24, 25, 25, 25, 26, 26, 26, 28, 29, 30, 31, 31, 31, 32, 32, 32, 34, 35,
            36, 37, 38, 39, 40, 41, 42, 43
        ],
        [
            0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 6, 7, 8, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
            21, 19, 20, 21, 22, 23, 24, 25, 26, 27, 25, 26, 27, 28, 29, 30, 31, 32, 33, 31, 32, 33, 34, 35,
            36, 37, 38, 39, 40, 41, 42, 43
        ],
    ]
    # fmt: on
