"""From the settings of a run to the loaders of its stages: sources by name, and the conversion that a stage's limits ask for."""

from collections.abc import Mapping
from typing import Any

from openkeye.data.config import LoaderConfig
from openkeye.data.convert import Converter, DocumentLimits
from openkeye.data.loader import Loader
from openkeye.data.sources.opening import open_source
from openkeye.inputs.processor import resolve_model_dir
from openkeye.train.config import RunConfig
from openkeye.train.shard import Ranks


class OpenLoader:
    """Makes the loaders of a run's stages. All sources are opened at once, so that a wrong path ends no run in its third stage."""

    def __init__(self, config: RunConfig) -> None:
        """Raises InputError where a source of any stage cannot be opened."""
        self.model_dir = str(resolve_model_dir(config.model_dir))
        drawn = dict.fromkeys(share.source for stage in config.stages for share in stage.mixture)
        self.sources = {name: open_source(name, config.sources[name], self.model_dir) for name in drawn}

    def __call__(self, config: LoaderConfig, ranks: Ranks, state: Mapping[str, Any] | None) -> Loader:
        """The loader of one stage; `state` is where it was left, or None.

        Raises:
            InputError: the sources do not fit the state.
        """
        limits = DocumentLimits(config.context, config.max_clip_seconds, config.video_tokens)
        return Loader(self.sources, config, Converter(self.model_dir, limits), ranks.rank, ranks.size, state)
