"""Two GPUs answer as one does; NCCL between them."""

import pytest
import torch

from tests.engine.answers_of_ranks import work
from tests.rank_processes import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]


def test_two_gpus_answer_as_one_does(tmp_path):
    statuses = run_ranks(2, "tests.engine.answers_of_ranks", "openkeye-tiny", "whole", tmp_path / "out.pt", "cuda")
    assert all(status == 0 for status, _, _ in statuses), statuses
    found, expected = torch.load(tmp_path / "out.pt"), work("openkeye-tiny", "whole", "cuda")
    for name, result in expected.items():
        assert found[name]["tokens"] == result["tokens"], name
        torch.testing.assert_close(found[name]["logprobs"], result["logprobs"], atol=1e-4, rtol=1e-4)
