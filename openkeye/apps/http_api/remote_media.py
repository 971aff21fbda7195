"""Fetching a picture or a video from the network without becoming anybody's way into our own.

A name is resolved first, every one of its addresses must be public, and the connection goes to the very address that was
looked at: a name server that answers differently the second time gains nothing. Each redirect goes through the same.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from openkeye import __version__
from openkeye.apps.http_api.errors import ApiError

PORTS = {"http": 80, "https": 443}
CHUNK_BYTES = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)

NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class RemoteLimits:
    """How much one request may fetch."""

    max_bytes: int = 256 << 20
    timeout_seconds: float = 30.0
    # from the first name to the last byte
    max_redirects: int = 3


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, and does not carry a private one inside."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        # Ways to write an IPv4 address into an IPv6 one, which some networks translate back.
        if ip.sixtofour is not None or ip.teredo is not None or ip in NAT64:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local)


def fetch(url: str, limits: RemoteLimits) -> bytes:
    """The content of an http or https address.

    Raises:
        ApiError: 400 for an address that is not public, too large, too slow, redirected too often, or not to be had.
    """
    end = time.monotonic() + limits.timeout_seconds
    shown = f"{url:.80}"
    for _ in range(limits.max_redirects + 1):
        target = _checked(url, shown)
        connection = _Pinned(target, _public_address(target, shown), _seconds_left(end, shown))
        # Of a server that sends a byte now and then no single read is late: at the end the connection is cut.
        alarm = threading.Timer(_seconds_left(end, shown), connection.cut)
        alarm.start()
        try:
            location = connection.ask(target)
            if location is None:
                return connection.read(limits.max_bytes, end, shown)
            url = urljoin(url, location)
        except (OSError, http.client.HTTPException, ValueError) as error:
            _seconds_left(end, shown)
            raise ApiError(400, f"{shown}: cannot be fetched ({type(error).__name__}); send the file as a data URL") from None
        finally:
            alarm.cancel()
            connection.close()
    raise ApiError(400, f"{shown}: more than {limits.max_redirects} redirects; give the final address")


def _checked(url: str, shown: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ApiError(400, f"{shown}: not an address") from None
    if parts.scheme not in PORTS or not parts.hostname or parts.username is not None or parts.password is not None:
        raise ApiError(400, f"{shown}: leads to something other than http(s)://HOST/PATH; only that is fetched")
    if port not in (None, PORTS[parts.scheme]) and port not in PORTS.values():
        raise ApiError(400, f"{shown}: port {port}; only 80 and 443 are fetched from")
    return parts


def _public_address(target: SplitResult, shown: str) -> tuple[str, int]:
    port = target.port or PORTS[target.scheme]
    try:
        found = socket.getaddrinfo(target.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ApiError(400, f"{shown}: this host has no address; check the name") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not all(is_public(address) for address in addresses):
        raise ApiError(400, f"{shown}: leads to an address that is not public; only public ones are fetched from")
    return addresses[0], port


def _seconds_left(end: float, shown: str) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise ApiError(400, f"{shown}: takes too long; send the file as a data URL")
    return left


class _Pinned:
    """One connection to an address that was looked at, for a host that is asked and verified by its name."""

    def __init__(self, target: SplitResult, address: tuple[str, int], timeout_seconds: float) -> None:
        assert target.hostname is not None
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._connection = http.client.HTTPConnection(target.hostname, address[1], timeout=timeout_seconds)
        self._name = target.hostname if target.scheme == "https" else None
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None

    def ask(self, target: SplitResult) -> str | None:
        """Send the request; returns where a redirect leads, or None where the content follows."""
        self._socket = socket.create_connection(self._address, self._timeout_seconds)
        if self._name is not None:
            self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=self._name)
        self._connection.sock = self._socket
        path = f"{target.path or '/'}?{target.query}" if target.query else target.path or "/"
        headers = {
            "Host": target.netloc,
            "User-Agent": f"openkeye/{__version__}",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        self._connection.request("GET", path, headers=headers)
        self._response = self._connection.getresponse()
        if self._response.status in REDIRECTS:
            return self._response.headers["Location"] or ""
        if self._response.status != 200:
            raise ApiError(400, f"{target.geturl():.80}: answers with status {self._response.status}; check the address")
        return None

    def read(self, max_bytes: int, end: float, shown: str) -> bytes:
        """The whole content, unless it is too much."""
        assert self._response is not None
        num_stated = self._response.length
        content = bytearray()
        while len(content) != num_stated and len(content) <= max_bytes >= (num_stated or 0):
            chunk = self._response.read1(CHUNK_BYTES)
            if not chunk:
                break
            content += chunk
            _seconds_left(end, shown)
        if max(len(content), num_stated or 0) > max_bytes:
            raise ApiError(400, f"{shown}: more than {max_bytes:,} bytes; send a smaller file")
        if num_stated is not None and len(content) < num_stated:
            raise http.client.IncompleteRead(bytes(content), num_stated - len(content))
        _seconds_left(end, shown)
        return bytes(content)

    def cut(self) -> None:
        """End it at once, from another thread."""
        if self._socket is not None:
            # (closed meanwhile: nothing is left to end)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back."""
        if self._response is not None:
            self._response.close()
        self._connection.close()
        if self._socket is not None:
            self._socket.close()
