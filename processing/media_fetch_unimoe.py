"""Download of one medium from an allowed host, built against server-side request forgery.

The URL is parsed once, strictly; the host must be on the allow-list; its name is resolved once and every address it
has must be public; the connection goes to that very address (so a second DNS answer cannot redirect it); redirects are
refused; size and time are capped.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
from typing import Any

from .media_policy_unimoe import MediaError, MediaPolicy

# Stricter than RFC 3986 on purpose: no user part, no backslash, no spaces, no control or non-ASCII characters.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>/[!$%&'()*+,./0-9:;=?@A-Z_a-z~-]*)?",
    re.ASCII,
)
_DATA_URL = re.compile(r"data:[a-z]+/[a-z0-9.+-]+;base64,", re.ASCII)
_MAX_URL_CHARACTERS = 2048
_MAX_NAMED = 200
# Ranges that carry or translate to IPv4 addresses: a private address could hide inside them.
_TRANSLATED = [ipaddress.ip_network(n) for n in ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48", "::/96")]


def is_url(text: str) -> bool:
    """Whether a string is meant as a URL rather than a path: it begins with `scheme://`, `//` or `data:`."""
    return bool(re.match(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]{2}|\s*(?:data|file|http|https|ftp|jar):", text, re.I))


def place_of(value: Any, where: str) -> str:
    """`where` with the path of a medium that is a file, its last 200 characters: people know files by their names."""
    if not isinstance(value, str | os.PathLike):
        return where
    path = os.fsdecode(value)
    if not path.strip() or is_url(path):
        return where
    name = repr(path if len(path) <= _MAX_NAMED else f"...{path[-_MAX_NAMED:]}")
    return where if name in where or path == where else f"{where}, {name}".removeprefix(", ")


def fetch(url: str, policy: MediaPolicy, kind: str, where: str = "") -> bytes:
    """Bytes of a `data:` URL, or of an http(s) URL that `policy` allows.

    Raises:
        MediaError: the URL is malformed, not allowed, resolves to a non-public address, redirects, or is too big or slow.
    """
    if url[:5].lower() == "data:":
        return _decode_data_url(url, policy, kind, where)
    if not policy.allow_network:
        reason = (
            "URLs are refused because network access is off: give the medium itself, as a file, bytes or a data: URL. "
            "Whoever runs the program can allow hosts: MediaPolicy(allow_network=True, allowed_hosts=...), or "
            "`unimoe serve --media-host HOST`"
        )
        raise MediaError(kind, reason, where)
    match = _URL.fullmatch(url) if len(url) <= _MAX_URL_CHARACTERS else None
    if match is None:
        raise MediaError(kind, "the URL is not of the plain form https://host/path", where)
    scheme, host = match["scheme"], match["host"]
    if scheme == "http" and not policy.allow_plain_http:
        raise MediaError(kind, "plain http is not allowed; use https", where)
    if host not in policy.allowed_hosts:
        raise MediaError(
            kind, "the URL's host is not among the allowed hosts (MediaPolicy.allowed_hosts; --media-host)", where
        )
    port = int(match["port"] or {"http": 80, "https": 443}[scheme])
    if port not in (80, 443):
        raise MediaError(kind, f"port {port} is not allowed; only 80 and 443 are", where)
    address = _resolve_public(host, port, kind, where)
    return _download(scheme, host, address, port, match["target"] or "/", policy, kind, where)


def is_public_address(text: str) -> bool:
    """Whether an IP address belongs to the public internet (not private, loopback, link-local, multicast or translated)."""
    address = ipaddress.ip_address(text.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public_address(str(address.ipv4_mapped))
        if any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _decode_data_url(url: str, policy: MediaPolicy, kind: str, where: str) -> bytes:
    match = _DATA_URL.match(url[:200])
    if match is None:
        raise MediaError(kind, "only data URLs of the form data:type/subtype;base64,... are read", where)
    if (len(url) - match.end()) * 3 // 4 > min(policy.network_bytes, policy.limits.max_file_bytes):
        raise MediaError(kind, f"the data URL holds more than {policy.network_bytes} bytes", where)
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(kind, "the data URL is not valid base64", where) from None


def _resolve_public(host: str, port: int, kind: str, where: str) -> str:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise MediaError(kind, "the URL's host name does not resolve", where) from None
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(is_public_address(address) for address in addresses):
        raise MediaError(kind, "the URL's host resolves to an address that is not public", where)
    return addresses[0]


def _download(
    scheme: str, host: str, address: str, port: int, target: str, policy: MediaPolicy, kind: str, where: str
) -> bytes:
    connection = http.client.HTTPConnection(host, port)
    watchdog = line = None
    expired = threading.Event()
    try:
        raw = socket.create_connection((address, port), timeout=policy.network_seconds)
        # The socket's own timeout restarts with every byte; this one does not, so a dripping server is cut off too.
        line = raw.dup()  # TLS takes `raw` over
        watchdog = threading.Timer(policy.network_seconds, _shut_down, args=(line, expired))
        watchdog.daemon = True
        watchdog.start()
        connection.sock = (
            ssl.create_default_context().wrap_socket(raw, server_hostname=host) if scheme == "https" else raw
        )
        connection.request("GET", target, headers={"User-Agent": "unimoe", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status != 200:
            raise MediaError(kind, f"the server answered with status {response.status}; redirects are refused", where)
        content = response.read(policy.network_bytes + 1)
        if response.length and len(content) <= policy.network_bytes:
            raise http.client.IncompleteRead(content)
        # A line cut in the headers reads like their end, so the reader alone cannot tell.
        if expired.is_set():
            raise TimeoutError("media download")
    except (OSError, http.client.HTTPException):
        raise MediaError(kind, f"the download failed or took over {policy.network_seconds:g} s", where) from None
    finally:
        if watchdog is not None and line is not None:
            watchdog.cancel()
            line.close()
        connection.close()
    if len(content) > policy.network_bytes:
        raise MediaError(kind, f"the download exceeds {policy.network_bytes} bytes", where)
    return content


def _shut_down(raw: socket.socket, expired: threading.Event) -> None:
    expired.set()  # first: the reader wakes up at once
    with contextlib.suppress(OSError):
        raw.shutdown(socket.SHUT_RDWR)
