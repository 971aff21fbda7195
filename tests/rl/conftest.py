"""The bundled checkpoint's processor and a small video."""

from tests.engine.conftest import processor, video

__all__ = ["processor", "video"]
