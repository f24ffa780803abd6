"""Hostile URLs and servers. Only `MediaError` may come out."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_media
from refusals import refused

from unimoe.processing import media_fetch_unimoe
from unimoe.processing.media_audio_unimoe import load_audio
from unimoe.processing.media_fetch_unimoe import is_public_address
from unimoe.processing.media_policy_unimoe import MediaError, MediaPolicy
from unimoe.processing.media_unimoe import load_image
from unimoe.processing.media_video_unimoe import load_video

HOSTILE_URLS = [
    "http://127.0.0.1/a.png",
    "https://127.0.0.1/a.png",
    "https://127.1/a.png",
    "https://2130706433/a.png",
    "https://0x7f000001/a.png",
    "https://0177.0.0.1/a.png",
    "https://0/a.png",
    "https://[::1]/a.png",
    "https://[::ffff:127.0.0.1]/a.png",
    "https://[::ffff:7f00:1]/a.png",
    "https://[fe80::1%25eth0]/a.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://10.0.0.1/a.png",
    "https://192.168.1.1/a.png",
    "https://localhost/a.png",
    "https://localhost./a.png",
    "https://metadata.google.internal/a.png",
    "https://allowed.example@127.0.0.1/a.png",
    "https://127.0.0.1\\@allowed.example/a.png",
    "https://allowed.example\\@127.0.0.1/a.png",
    "https://allowed.example:80@127.0.0.1/a.png",
    "https://allowed.example#@127.0.0.1/a.png",
    "https://allowed.example?@127.0.0.1/a.png",
    "https://allowed.example.evil.example/a.png",
    "https://evil.example/allowed.example/a.png",
    "https://xallowed.example/a.png",
    "https://ALLOWED.example/a.png",
    "https://allowed.example./a.png",
    "https://allowed.example:22/a.png",
    "https://allowed.example:0443x/a.png",
    "https://allowed.example/a.png\r\nHost: evil.example",
    "https://allowed.example/\u0661",
    "https://\u0430llowed.example/a.png",
    "https://allowed\u3002example/a.png",
    "https:///allowed.example/a.png",
    "https:\\\\allowed.example\\a.png",
    " https://allowed.example/a.png",
    "http://allowed.example/a.png",
    "//allowed.example/a.png",
    "file:///etc/passwd",
    "ftp://allowed.example/a.png",
    "gopher://allowed.example/_GET",
    "jar:https://allowed.example!/a",
    "data:image/png,plain",
    "data:image/png;base64,!!!!",
    "data:image/png;base64," + "A" * (1 << 20),
    "https://allowed.example/" + "a" * 5000,
]


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every name looked up and every socket connected, none of which really happens."""
    seen: list[Any] = []

    def record(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, args))
            raise OSError("no network in tests")

        return refuse

    monkeypatch.setattr(socket, "create_connection", record("create_connection"))
    monkeypatch.setattr(socket.socket, "connect", record("connect"))
    monkeypatch.setattr(socket.socket, "connect_ex", record("connect_ex"))
    monkeypatch.setattr(socket, "getaddrinfo", record("getaddrinfo"))
    return seen


ONLINE = MediaPolicy(allow_network=True, allowed_hosts=frozenset({"allowed.example"}), network_bytes=1 << 19)


@pytest.mark.parametrize("url", HOSTILE_URLS, ids=range(len(HOSTILE_URLS)))
def test_hostile_urls_open_no_socket(url: str, connections: list[Any]) -> None:
    for load in (load_image, load_audio, load_video):
        for policy in (ONLINE, MediaPolicy()):
            with refused("URL|http|port|file cannot be opened|readable"):
                load(url, policy=policy)
    assert connections == []


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Make successive look-ups give these addresses; returns the list of names looked up."""
    names: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        names.append(host)
        addresses = answers[min(len(names), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return names


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["255.255.255.255"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1%2"],
        ["fd00::1"],
        ["64:ff9b::a00:1"],
        ["2002:7f00:1::"],
        ["::7f00:1"],
        ["8.8.8.8", "127.0.0.1"],
        [],
    ],
)
def test_allowed_names_with_private_addresses(
    addresses: list[str], connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, addresses)
    with refused("not public", "image"):
        load_image("https://allowed.example/a.png", policy=ONLINE)
    assert connections == []
    assert not addresses or not all(is_public_address(address) for address in addresses)


def test_a_second_dns_answer_is_never_asked_for(connections: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = resolve_to(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    with refused("download failed", "image"):
        load_image("https://allowed.example/a.png", policy=ONLINE)
    assert names == ["allowed.example"]
    assert [args[0] for _, args in connections] == [("8.8.8.8", 443)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], MediaPolicy]]:
    """Answers the next request on a local port with given bytes; the address check is told that this is public."""
    import threading

    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(5)
    address = listener.getsockname()
    connect = socket.create_connection
    monkeypatch.setattr(media_fetch_unimoe, "_resolve_public", lambda *a: "203.0.113.1")
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: connect(address, timeout=timeout))

    def serve(answer: bytes, pause: float = 0.0) -> None:
        with listener.accept()[0] as peer:
            peer.settimeout(5)
            peer.recv(4096)
            try:
                for start in range(0, len(answer), 1 if pause else 1 << 16):
                    peer.sendall(answer[start : start + (1 if pause else 1 << 16)])
                    time.sleep(pause)
            except OSError:
                return  # the client hung up, as it should on too much or too slow an answer

    def start(answer: bytes, pause: float = 0.0) -> MediaPolicy:
        threading.Thread(target=serve, args=(answer, pause), daemon=True).start()
        hosts = frozenset({"allowed.example"})
        return MediaPolicy(None, True, True, hosts, True, network_seconds=0.3 if pause else 5.0, network_bytes=100_000)

    yield start
    listener.close()


URL = "http://allowed.example/a.png"


def test_an_allowed_download_works(server: Callable[..., MediaPolicy]) -> None:
    data = tiny_media.encoded_picture()
    policy = server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
    assert load_image(URL, policy=policy).size == (24, 20)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n" + bytes(200_000), "exceeds 100000 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(200_000), "exceeds 100000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nshort", "download failed"),
        (b"SSH-2.0-OpenSSH\r\n", "download failed"),
    ],
)
def test_answers_of_servers_are_capped(server: Callable[..., MediaPolicy], answer: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        load_image(URL, policy=server(answer))


def test_a_dripping_server_is_cut_off(server: Callable[..., MediaPolicy]) -> None:
    policy = server(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500, pause=0.02)
    start = time.perf_counter()
    with pytest.raises(MediaError, match=r"took over 0\.3 s"):
        load_image(URL, policy=policy)
    assert time.perf_counter() - start < 3
