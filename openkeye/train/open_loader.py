"""From the settings of a stage to its loader: sources by name, and the conversion that its limits ask for."""

from collections.abc import Mapping
from typing import Any

from openkeye.data.config import LoaderConfig
from openkeye.data.loader import Loader
from openkeye.inputs.processor import resolve_model_dir
from openkeye.train.config import RunConfig
from openkeye.train.shard import Ranks


def open_loader(config: RunConfig, loader: LoaderConfig, ranks: Ranks, state: Mapping[str, Any] | None) -> Loader:
    """The loader of one stage; `state` is where it was left, or None.

    Raises:
        InputError: a source cannot be opened, or does not fit the state.
    """
    # What reads media is loaded by those alone who read.
    from openkeye.data.convert import Converter, DocumentLimits
    from openkeye.data.sources.opening import open_source

    model_dir = str(resolve_model_dir(config.model_dir))
    sources = {share.source: open_source(share.source, config.sources[share.source], model_dir) for share in loader.shares}
    limits = DocumentLimits(loader.context, loader.max_clip_seconds, loader.video_tokens)
    return Loader(sources, loader, Converter(model_dir, limits), ranks.rank, ranks.size, state)
