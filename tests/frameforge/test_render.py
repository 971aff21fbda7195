"""What is drawn is what the scene says."""

import numpy as np
import torch

from openkeye.frameforge.render import join_jobs, render, scene_job, split_job
from openkeye.frameforge.scene import Background, Scene, Track
from openkeye.frameforge.stream import codec_like, codec_like_by_frame, damage_table, make_training_clip
from openkeye.frameforge.writer import make_clip

GREY = Background("plain", (90.0, 90.0, 90.0), (90.0, 90.0, 90.0), 0.0)


def one_circle() -> Scene:
    track = Track(0, 0, 0, 1, ((1.0, 2.0),), ((0.0, 0.25, 0.75),), 0)
    return Scene(0.0, 3.0, (track,), GREY)


def test_a_sprite_stands_in_its_place_and_only_in_its_time():
    frames = render(scene_job(one_circle(), np.array([0.9, 1.0, 1.9, 2.0])), 112, "cpu").float()
    empty = torch.tensor([90.0, 90.0, 90.0])
    assert torch.equal(frames[0], empty.expand(112, 112, 3)) and torch.equal(frames[3], frames[0])
    centre = frames[1, 84, 28]
    assert (centre - torch.tensor([214.0, 40.0, 40.0])).abs().max() <= 2
    changed = (frames[1] != empty).any(dim=-1).nonzero().float() / 112
    assert (changed.mean(dim=0) - torch.tensor([0.75, 0.25])).abs().max() < 0.01
    assert (changed.max(dim=0).values - changed.min(dim=0).values - 0.26).abs().max() < 0.05


def test_drawing_is_deterministic_and_clips_do_not_mix():
    jobs = [scene_job(make_clip(1, index).scene, np.arange(4) * 1.0) for index in range(3)]
    together = render(join_jobs(jobs), 112, "cpu")
    apart = torch.cat([render(job, 112, "cpu") for job in jobs])
    assert torch.equal(together, apart) and torch.equal(together, render(join_jobs(jobs), 112, "cpu"))


def test_a_job_in_pieces_is_the_same_drawing():
    job = join_jobs([scene_job(make_clip(1, index).scene, np.arange(5) * 1.0) for index in range(3)])
    parts = list(split_job(job, 4))
    assert [part.num_frames for part in parts] == [(4,), (1, 3), (2, 2), (3,)]
    assert torch.equal(torch.cat([render(part, 112, "cpu") for part in parts]), render(job, 112, "cpu"))


def test_damage_by_frame_leaves_the_others_alone():
    frames = render(scene_job(make_clip(1, 0).scene, np.arange(24) / 2), 112, "cpu")
    table = damage_table(3, 24)
    is_hit = torch.from_numpy(table[:, 0] >= 0)
    damaged = codec_like_by_frame(frames.clone(), table)
    assert torch.equal((damaged != frames).flatten(1).any(dim=1), is_hit) and 0 < is_hit.sum() < 24
    assert (damaged.float() - frames.float()).abs().mean() < 8
    # A frame's damage is its own, whatever is damaged beside it.
    alone = torch.cat([codec_like_by_frame(frames[n : n + 1].clone(), table[n : n + 1]) for n in range(24)])
    assert torch.equal(alone, damaged)
    assert len(np.unique(damage_table(3, 600)[:, 1])) == 12 and len(damage_table(0, 1)) == 1


def test_cell_labels_name_what_is_centred_there():
    labels = scene_job(one_circle(), np.array([1.5])).cell_labels(4)
    assert np.flatnonzero(labels["sprites"]).tolist() == [3 * 4 + 1]
    assert {name: int(labels[name][13]) for name in ("colours", "sprites", "tracks")} == {
        "colours": 1,
        "sprites": 1,
        "tracks": 1,
    }
    assert np.allclose(labels["offsets"][13], [-0.5, -0.5])


def test_cells_know_what_they_have_become():
    path = ((0.0, 0.1, 0.4), (2.0, 0.9, 0.4))
    mover = Track(0, 0, 0, 0, ((0.0, 2.0), (4.0, 6.0)), path, 0)
    scene = Scene(0.0, 6.0, (mover,), GREY)
    job = join_jobs([scene_job(scene, np.arange(0, 6, 0.5)), scene_job(scene, np.array([4.0, 4.5]))])
    labels = job.cell_labels(4)
    filled = np.flatnonzero(labels["sprites"])
    assert (filled // 16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13]
    # First appearance, three times the same, a return; the second clip begins anew.
    assert labels["onsets"][filled].tolist() == [2, 1, 1, 1, 3, 1, 1, 1, 2, 1]
    assert labels["directions"][filled].tolist() == [1, 3, 3, 3, 1, 1, 1, 1, 1, 1]


def test_codec_damage_is_damage_and_not_another_picture():
    frames = render(scene_job(make_clip(1, 0).scene, np.arange(48) * 0.25), 112, "cpu")
    damaged = codec_like(frames, torch.Generator().manual_seed(0))
    assert damaged.shape == frames.shape and damaged.dtype == torch.uint8 and not torch.equal(damaged, frames)
    error = (damaged.float() - frames.float()).pow(2).mean()
    assert 10 * torch.log10(255**2 / error) > 24


def test_a_training_clip_is_a_function_of_its_seed_and_index():
    first, again, other = (make_training_clip(3, index, 16) for index in (5, 5, 6))
    assert first.questions == again.questions and np.array_equal(first.job.instances, again.job.instances)
    assert first.questions != other.questions
