"""Tests marked `gpu` are skipped where there is no CUDA GPU; where there is one, tests for either device carry the mark too."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the skip to whatever is marked `gpu`, or the mark to what asks for the device."""
    for item in items:
        if torch.cuda.is_available():
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
