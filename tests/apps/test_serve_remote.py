"""Fetching from the network: only public addresses, in limits. A server on this machine plays the internet."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from openkeye.apps.http_api import remote_media
from openkeye.apps.http_api.errors import ApiError
from openkeye.apps.http_api.remote_media import RemoteLimits, fetch, is_public


class Internet(http.server.BaseHTTPRequestHandler):
    """Paths say what happens."""

    def do_GET(self) -> None:
        kind, _, argument = self.path.strip("/").partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", f"http://{argument}" if "." in argument or "[" in argument else f"/{argument}")
            self.end_headers()
        elif kind == "status":
            self.send_error(int(argument))
        elif kind == "head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self._drip()
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            self._drip()
        else:
            self.send_response(200)
            # ("short" states more than it sends)
            self.send_header("Content-Length", "100" if kind == "short" else argument)
            self.end_headers()
            self.wfile.write(b"x" * min(int(argument), 5000))

    def _drip(self) -> None:
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            return

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of a server that counts as public here, under one of the two names that resolve to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Internet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    port = server.server_address[1]

    def resolve(host: str, *arguments: object, **options: object) -> list[tuple]:
        address = {"public.test": "127.0.0.1", "both.test": "127.0.0.1"}.get(host, host)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
        return found + [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))] * (host == "both.test")

    monkeypatch.setattr(remote_media.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote_media, "PORTS", {"http": port, "https": 443})
    monkeypatch.setattr(remote_media, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    yield "public.test"
    server.shutdown()
    server.server_close()


def test_content_comes_also_behind_redirects(internet):
    assert fetch(f"http://{internet}/give/9", RemoteLimits()) == b"x" * 9
    assert fetch(f"http://{internet}/to/to/give/9", RemoteLimits()) == b"x" * 9


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("to/to/to/to/give/9", "more than 3 redirects"),
        ("to/10.0.0.1/secret", "not public"),
        ("to/[::1]/secret", "only that is fetched|not public"),
        ("status/404", "status 404"),
        ("give/1000001", "more than 1,000,000 bytes"),
        ("short/5", "cannot be fetched"),
        ("drip/", "too long"),
        ("head/", "too long"),
    ],
)
def test_what_is_refused(internet, path, said):
    start = time.monotonic()
    with pytest.raises(ApiError, match=said) as told:
        fetch(f"http://{internet}/{path}", RemoteLimits(max_bytes=1_000_000, timeout_seconds=1.5))
    assert told.value.status == 400 and time.monotonic() - start < 4


def test_a_host_with_one_private_address_is_refused(internet):
    with pytest.raises(ApiError, match="not public"):
        fetch("http://both.test/give/9", RemoteLimits())


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.9.8.7", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("localhost", False),
    ],
)
def test_public_addresses(address, wanted):
    assert is_public(address) is wanted
