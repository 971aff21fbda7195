"""OpenKeye: an open implementation of the Keye-VL-2.0 system. `Engine` answers questions about videos."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openkeye.engine.loop import Engine

__all__ = ["Engine"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `openkeye --help` must answer in less than one.
    if name == "Engine":
        from openkeye.engine.loop import Engine

        return Engine
    raise AttributeError(f"module 'openkeye' has no attribute {name!r}")
