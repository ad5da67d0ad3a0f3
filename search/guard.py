"""A guard before the Optuna dashboard, which has none: it answers any Host and lets anybody delete studies."""

import base64
import binascii
import hmac
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
READING = ("GET", "HEAD", "OPTIONS")
HEADERS = [("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "same-origin")]

Start = Callable[..., Any]
App = Callable[[dict[str, Any], Start], Iterable[bytes]]


def guard(app: App, *, hosts: Collection[str] = LOOPBACK, password: str | None = None, writable: bool = False) -> App:
    """A WSGI app that lets through what `app` may answer.

    403 for a Host that is not one of `hosts` (names without ports), or for writing from a page of another
    origin; 401 without the password, if there is one (HTTP basic, any user); 405 for writing unless `writable`.
    """

    def guarded(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        def answer(status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
            body = f"{text}\n".encode()
            plain = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
            start(status, [*plain, *HEADERS, *headers])
            return [body]

        def start_with_headers(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start(status, [*headers, *HEADERS], *rest)

        if _name(environ.get("HTTP_HOST", "")) not in hosts:
            return answer("403 Forbidden", "this address is not allowed; SIEVE_DASHBOARD_HOSTS names those that are")
        if password is not None and not _knows(environ.get("HTTP_AUTHORIZATION", ""), password):
            asks = ("WWW-Authenticate", 'Basic realm="Sieve", charset="UTF-8"')
            return answer("401 Unauthorized", "a password is needed (any user)", asks)
        if environ["REQUEST_METHOD"] not in READING:
            if not writable:
                allowed = ("Allow", ", ".join(READING))
                return answer("405 Method Not Allowed", "read-only; `sieve dashboard --writable` is not", allowed)
            origin = environ.get("HTTP_ORIGIN")
            if origin is not None and urlsplit(origin).hostname not in hosts:
                return answer("403 Forbidden", "another page may not write here")
        return app(environ, start_with_headers)

    return guarded


def _name(host: str) -> str | None:
    """`localhost` of `localhost:8080`, `::1` of `[::1]:8080`."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _knows(authorization: str, password: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        given = b""
    return hmac.compare_digest(given, password.encode()) and scheme.lower() == "basic"
