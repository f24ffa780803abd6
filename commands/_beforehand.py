"""What commands check, and say, before they import anything heavy; wrong names of models are `model_folder`'s."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ..errors import MissingPackageError, UniMoeError


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Say on the standard error that a model is being opened, and how long it took; importing torch is part of it."""
    print(f"Opening {name} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    yield
    print(f"Ready after {time.perf_counter() - started:.1f} s.", file=sys.stderr, flush=True)


def require_extra(extra: str, *packages: str) -> None:
    """Raises MissingPackageError if a package of one of our extras is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"This command needs {missing[0]}, which is in the extra `{extra}`: pip install 'unimoe[{extra}]'."
        )


def require_file(what: str, name: str) -> None:
    """Raises UniMoeError if there is no such file, or it may not be read; `what` says what it should be."""
    try:
        open(name, "rb").close()
    except OSError as error:
        raise UniMoeError(f"{what} {name} cannot be read ({error.strerror}): check the path.") from error


def require_address(host: str, port: int) -> None:
    """Refuse an address that nobody can listen at now: another server has it, or it is no address of this machine.

    Raises:
        UniMoeError: says which, and of which option.
    """
    if not 1 <= port <= 65535:
        raise UniMoeError(f"--port is {port}; it must be from 1 to 65535.")
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UniMoeError(f"--host is {host!r}, which is no address ({error}): use 127.0.0.1 or 0.0.0.0.") from error
    with socket.socket(family, kind, protocol) as listener:
        if sys.platform != "win32":
            # As servers do it: a port whose server has just ended is free. Windows would share one that is in use.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise UniMoeError(
                f"{host}:{port} cannot be listened at ({error.strerror}): give another --port, or end the program that has it."
            ) from error


__all__ = ["opening", "require_address", "require_extra", "require_file"]
