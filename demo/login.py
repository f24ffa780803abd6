"""The password, where one is asked for: nothing of the page is sent to a browser that has not given it."""

import hmac
import secrets
import time
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from ..pages.html_page import escape
from ..serving.asgi import App, Receive, Scope, Send, header, read_body, respond

_COOKIE = "unimoe_demo"
_LONGEST_FORM = 4096
# Wrong passwords from one address before it must wait, and for how many seconds they count.
_TRIES, _SECONDS = 10, 60.0
# Addresses that are remembered; where more fail at once, all wait.
_MOST_ADDRESSES = 10_000

_PAGE = """<!doctype html><html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width,initial-scale=1"><title>Password</title><style>
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:20rem;margin:20vh auto 0;padding:0 1rem}
input,button{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;margin:.3rem 0}.bad{color:#b42318}
</style></head><body><form method=post action=login><label>Password<input type=password name=password autofocus
autocomplete=current-password></label><button>Open</button></form><p class=bad role=alert>REASON</p></body></html>"""


class Login:
    """ASGI middleware: asks for a password and remembers by a cookie who gave it."""

    def __init__(self, app: App, password: str, path: str = "/") -> None:
        self.app, self.path = app, path
        self._key = secrets.token_bytes(32)
        self._token = secrets.token_urlsafe(32)
        self._password = self._digest(password)
        self._failures: dict[str, list[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_known(scope):
            await self.app(scope, receive, send)
        elif scope["path"] == "/login" and scope["method"] == "POST":
            await self._log_in(scope, receive, send)
        elif scope["path"] in ("/", "/login"):
            await _ask(send, 200, "")
        else:
            await respond(send, 401, "Give the password first.")

    def _is_known(self, scope: Scope) -> bool:
        try:
            cookie = SimpleCookie(header(scope, b"cookie")).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._token.encode())

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("",))[0]
        now = time.monotonic()
        self._failures = {
            a: recent for a, old in self._failures.items() if (recent := [t for t in old if t > now - _SECONDS])
        }
        failures = self._failures.get(address, [])
        if len(failures) >= _TRIES or len(self._failures) >= _MOST_ADDRESSES:
            await _ask(send, 429, "Too many wrong passwords: wait a minute.")
            return
        # Noted before the body is awaited, or many requests at once would all be counted as the first.
        self._failures[address] = [*failures, now]
        if not hmac.compare_digest(self._digest(await _given_password(receive)), self._password):
            await _ask(send, 403, "This is not the password.")
            return
        self._failures.pop(address, None)
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{_COOKIE}={self._token}; Path={self.path}; HttpOnly; SameSite=Lax{secure}"
        await respond(send, 303, "", headers=(("location", self.path), ("set-cookie", cookie)))

    def _digest(self, password: str) -> bytes:
        """Of one length for all passwords, so that comparing two takes as long for any."""
        return hmac.digest(self._key, password.encode(), sha256)


async def _given_password(receive: Receive) -> str:
    body = await read_body(receive, _LONGEST_FORM) or b""
    fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=None)
    return fields.get("password", [""])[0]


async def _ask(send: Send, status: int, reason: str) -> None:
    await respond(send, status, _PAGE.replace("REASON", escape(reason)), "text/html", (("cache-control", "no-store"),))
