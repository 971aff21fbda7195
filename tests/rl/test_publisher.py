"""Weights published as changes lead every worker to the same bits, wherever it stands."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.engine.update_file import read_update, updates_among
from openkeye.engine.weight_update import Delta
from openkeye.rl.publisher import Publisher
from openkeye.rl.roles import Publication

SIZE = 1000


def versions(count: int, num_changed: int) -> list[dict[str, Tensor]]:
    """Weights in bfloat16, of which a few elements change from one version to the next."""
    rng = torch.Generator().manual_seed(1)
    found = [{name: torch.randn(SIZE, generator=rng).bfloat16() for name in ("a", "b")}]
    for _ in range(count):
        new = {name: tensor.clone() for name, tensor in found[-1].items()}
        new["a"][torch.randperm(SIZE, generator=rng)[:num_changed]] += 1
        found.append(new)
    return found


def brought(weights: dict[str, Tensor], version: int, published: Publication) -> dict[str, Tensor]:
    """What a worker of a version has when it has read a publication."""
    own = {name: tensor.clone() for name, tensor in weights.items()}
    for path in updates_among((*published.rests_on, published.path), version):
        for name, change in read_update(path).changes.items():
            if isinstance(change, Delta):
                change.apply(own[name])
            else:
                own[name] = change
    return own


def are_equal(own: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(own[name], other[name]) for name in other)


def test_few_changes_are_told_as_changes_and_workers_behind_catch_up(tmp_path: Path):
    weights, publisher = versions(4, num_changed=10), Publisher()
    publisher.begin(weights[0].items())
    for version in range(1, 5):
        published = publisher.publish(version, weights[version].items(), tmp_path)
        assert read_update(published.path).base == version - 1 and published.num_bytes < 2 * SIZE
        for behind in range(version):
            assert are_equal(brought(weights[behind], behind, published), weights[version])
    assert len(published.rests_on) == 3
    assert publisher.publish(4, weights[4].items(), tmp_path) is published


def test_whole_weights_take_the_place_of_changes_that_became_as_large(tmp_path: Path):
    weights, publisher = versions(4, num_changed=250), Publisher()
    publisher.begin(weights[0].items())
    told = [publisher.publish(version, weights[version].items(), tmp_path) for version in range(1, 5)]
    # 6 bytes a changed element, of 4,000 bytes in all.
    assert [read_update(one.path).base for one in told] == [0, 1, None, 3]
    assert told[2].rests_on == () and told[3].rests_on == (told[2].path,)
    assert are_equal(brought(weights[0], 0, told[3]), weights[4])


def test_a_learner_that_begins_anew_publishes_whole_weights(tmp_path: Path):
    weights = versions(1, num_changed=10)
    published = Publisher().publish(7, weights[1].items(), tmp_path)
    assert read_update(published.path).base is None and published.rests_on == ()
    assert are_equal(brought(weights[0], 3, published), weights[1])


def test_changes_to_another_version_are_refused(tmp_path: Path):
    weights, publisher = versions(2, num_changed=10), Publisher()
    publisher.begin(weights[0].items())
    published = publisher.publish(1, weights[1].items(), tmp_path)
    publisher.publish(2, weights[2].items(), tmp_path)
    with pytest.raises(InputError, match="rests on version 0"):
        updates_among((published.path,), 5)
