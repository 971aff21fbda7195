"""Which pictures and videos a request may name, and what the engine is given for them."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from openkeye.apps.http_api.errors import ApiError
from openkeye.apps.http_api.remote_media import RemoteLimits, fetch


class MediaRules:
    """Data URLs always; files only below one folder; the network only where the server was started for it."""

    def __init__(self, media_dir: Path | None = None, remote: RemoteLimits | None = None) -> None:
        """
        Args:
            media_dir: the folder below which files may be read; None for none.
            remote: limits of what is fetched from the network; None fetches nothing.
        """
        self.media_dir = None if media_dir is None else Path(os.path.realpath(media_dir))
        self.remote = remote

    def read(self, address: str) -> str | Path | bytes:
        """A data URL as it is, the path of an allowed file, or the bytes that were fetched. Blocks while it fetches.

        Raises:
            ApiError: 400, this address is not served.
        """
        scheme = address.partition(":")[0].lower() if ":" in address[:16] else ""
        if scheme == "data":
            return "data" + address[4:]
        if scheme in ("http", "https"):
            if self.remote is None:
                raise ApiError(400, f"{address:.80}: this server fetches no addresses; send the file as a data URL")
            return fetch(address, self.remote)
        if scheme == "file":
            return self._allowed_file(_path_of_url(address), address)
        if "://" in address[:32]:
            raise ApiError(400, f"{address:.80}: this kind of address is not served; send the file as a data URL")
        return self._allowed_file(address, address)

    def public_message(self, message: str) -> str:
        """An error of the engine without the place of the media folder on this machine."""
        return message if self.media_dir is None else message.replace(f"{self.media_dir}/", "")

    def _allowed_file(self, path: str, address: str) -> Path:
        if self.media_dir is None:
            raise ApiError(400, f"{address:.80}: this server reads no files (no --media-dir); send the file as a data URL")
        try:
            # Symbolic links and .. are followed first: what counts is where the file really is.
            real = Path(os.path.realpath(self.media_dir / path))
            is_inside, is_file = real.is_relative_to(self.media_dir), real.is_file()
        except (OSError, ValueError):
            # (ValueError: a zero byte, or half a character)
            raise ApiError(400, f"{address!r:.80}: not a path of a file") from None
        # One answer for both, so that nobody can find out which files exist elsewhere.
        if not is_inside or not is_file:
            raise ApiError(400, f"{address:.80}: no such file below the media folder; give its path from there")
        return real


def _path_of_url(address: str) -> str:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise ApiError(400, f"{address:.80}: a file on another machine; write file:///PATH")
    return unquote(parts.path)
