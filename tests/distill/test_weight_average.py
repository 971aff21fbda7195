from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.distill.teacher_weights import DELTA_SETTINGS, write_delta
from openkeye.distill.weight_average import add_directions, average, write_average
from openkeye.model.weights import load_model
from tests.distill.toy_teachers import TEXT_TOY, write_descendant, write_model


def made(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(values, dtype=dtype)}


def test_means_by_hand():
    models = [made(0.0, 3.0), made(1.0, 3.0), made(5.0, 0.0)]
    assert average(models)["a"].tolist() == [2.0, 2.0]
    assert average(models, [1, 1, 0])["a"].tolist() == [0.5, 3.0]
    assert average(models, [2, 2, 4])["a"].tolist() == [2.75, 1.5]
    assert add_directions(models[0], models[1:], 0.5)["a"].tolist() == [3.0, 1.5]
    assert add_directions(models[0], models[1:], 1.0)["a"].tolist() == [6.0, 0.0]


def test_equal_models_average_to_themselves_to_the_bit():
    for dtype in (torch.bfloat16, torch.float32):
        one = {"a": torch.randn(1000).to(dtype)}
        assert torch.equal(average([one] * 3)["a"], one["a"]) and average([one] * 3)["a"].dtype == dtype
    many = [made(1.0 + 2**-8 * n, dtype=torch.bfloat16) for n in range(3)]
    assert average(many)["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [2.0, -1.0]])
def test_weights_that_say_nothing(weights):
    with pytest.raises(ValueError, match="weights"):
        average([made(1.0), made(2.0)], weights)


def test_unlike_models_are_told():
    for other in ({"b": torch.zeros(1)}, made(1.0, 2.0)):
        with pytest.raises(ValueError, match="differ"):
            average([made(1.0), other])
        with pytest.raises(ValueError, match="differ"):
            add_directions(made(1.0), [other], 1.0)


def test_a_folder_of_the_mean_of_whole_teachers_and_deltas(tmp_path: Path):
    base = write_model(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    teachers = [write_descendant(base, tmp_path / f"teacher{number}", number) for number in range(2)]
    write_delta(base, teachers[1], tmp_path / "delta")
    expected = average([load_model(folder).state_dict() for folder in teachers], [1.0, 3.0])
    for first, second in ((teachers[0], tmp_path / "delta"), (teachers[0], teachers[1])):
        write_average([first, second], tmp_path / "mean", [1.0, 3.0], base)
        found = load_model(tmp_path / "mean").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not torch.equal(found["lm_head.weight"], load_model(base).state_dict()["lm_head.weight"])
    write_average([tmp_path / "delta"], tmp_path / "one", base_dir=base)
    assert not (tmp_path / "one" / DELTA_SETTINGS).exists() and load_model(tmp_path / "one")
    with pytest.raises(InputError, match="base_dir"):
        write_average([tmp_path / "delta"], tmp_path / "two")
    with pytest.raises(InputError, match="one architecture"):
        narrow = write_model(tmp_path / "narrow", config=replace(TEXT_TOY, moe_intermediate_size=8))
        write_average([base, narrow], tmp_path / "two")
    with pytest.raises(InputError, match="no teachers"):
        write_average([], tmp_path / "two")
