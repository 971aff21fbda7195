"""OpenKeye: an open implementation of the Keye-VL-2.0 system. `Engine` answers questions about videos."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openkeye.engine.config import EngineConfig, SamplingParameters
    from openkeye.engine.loop import Engine
    from openkeye.engine.service import EngineService
    from openkeye.engine.worker_service import WorkerService

__all__ = ["Engine", "EngineConfig", "EngineService", "SamplingParameters", "WorkerService"]
__version__ = "0.1.0"

_MODULES = {
    "Engine": "openkeye.engine.loop",
    "EngineConfig": "openkeye.engine.config",
    "EngineService": "openkeye.engine.service",
    "SamplingParameters": "openkeye.engine.config",
    "WorkerService": "openkeye.engine.worker_service",
}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `openkeye --help` must answer in less than one.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'openkeye' has no attribute {name!r}")
