"""`open_source`: from a reader's name and its options to a `Source`."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from openkeye.common.checks import InputError
from openkeye.data.config import SourceConfig
from openkeye.data.sample import Source

PACKAGE = "openkeye.data.sources"
Opener = Callable[[str, SourceConfig, str], Source]
# (name of the source, its settings, the model's folder)


def _reader(place: str) -> Opener:
    """Opens a class at `module:name`, made from (path, options by keyword); imported when it is used."""

    def open_reader(name: str, config: SourceConfig, model_dir: str) -> Source:
        module, attribute = place.split(":")
        try:
            reader = getattr(import_module(module), attribute)
        except AttributeError as error:
            raise InputError(f"source {name!r}: {error}; give MODULE:CLASS") from error
        except ModuleNotFoundError as error:
            raise InputError(
                f"source {name!r}: {config.reader} needs the package {error.name}; run `pip install 'openkeye[train]'`"
            ) from error
        parameters = inspect.signature(reader).parameters
        if not config.path and parameters["path"].default is inspect.Parameter.empty:
            # An empty path would be the folder that somebody happens to stand in.
            raise InputError(f"source {name!r}: {config.reader} got no path; give a file or a folder")
        return reader(config.path, **_checked(name, config, parameters))

    return open_reader


def _open_frameforge(name: str, config: SourceConfig, model_dir: str) -> Source:
    from openkeye.data.sources.frameforge import frameforge_source

    try:
        return frameforge_source(config.reader, model_dir, config.options)
    except InputError as error:
        raise InputError(f"source {name!r}: {error}") from error


READERS: dict[str, Opener] = {
    "chat_json_lines": _reader(f"{PACKAGE}.chat_json_lines:ChatJsonLines"),
    "web_dataset": _reader(f"{PACKAGE}.web_dataset:TarShards"),
    "parquet": _reader(f"{PACKAGE}.parquet:ParquetRows"),
    "charades_sta": _reader(f"{PACKAGE}.charades_sta:CharadesSta"),
    "qvhighlights": _reader(f"{PACKAGE}.qvhighlights:QvHighlights"),
    "timelens": _reader(f"{PACKAGE}.timelens:TimeLens"),
    "llava_video": _reader(f"{PACKAGE}.llava_video:LlavaVideo"),
    "text_files": _reader(f"{PACKAGE}.text_files:TextFiles"),
    "folder": _reader(f"{PACKAGE}.folder:Folder"),
    "frameforge_videos": _open_frameforge,
    "frameforge_pictures": _open_frameforge,
    "frameforge_text": _open_frameforge,
    "frameforge_captions": _open_frameforge,
}


def open_source(name: str, config: SourceConfig, model_dir: str | Path = "") -> Source:
    """The source that `config` describes. `name` is what the run calls it, for errors.

    Raises:
        InputError: an unknown reader or option, a value of the wrong type, or a file or folder that is not there.
    """
    opener = _reader(config.reader) if config.reader.count(":") == 1 else READERS.get(config.reader)
    if opener is None:
        raise InputError(
            f"source {name!r}: no reader {config.reader!r}; choose from {', '.join(READERS)}, or give MODULE:CLASS"
        )
    return opener(name, config, str(model_dir))


def _checked(
    name: str, config: SourceConfig, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, str | int | float | bool]:
    """The options, each of the type of the reader's default value."""
    known = {key: parameter.default for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    options = dict(config.options)
    for key, value in options.items():
        if key not in known:
            raise InputError(
                f"source {name!r}: {config.reader} has no option {key!r}; choose from {', '.join(known) or 'none'}"
            )
        wanted = type(known[key])
        if type(value) is int and wanted is float:
            options[key] = float(value)
        elif type(value) is not wanted:
            raise InputError(f"source {name!r}: option {key} is {value!r}; expected {wanted.__name__}")
    return options
