"""Typed settings out of a run's plain ones."""

from collections.abc import Mapping
from typing import TypeVar

from openkeye.common.fields import with_fields
from openkeye.rl.run_config import Option

Settings = TypeVar("Settings")


def settings_from(defaults: Settings, options: Mapping[str, Option]) -> Settings:
    """Typed settings with some fields changed by name."""
    return with_fields(defaults, [f"{name}={value}" for name, value in options.items()])
