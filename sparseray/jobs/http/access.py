"""Who may ask: API keys, origins of browsers, and the id of every request.

A page of another site can make a browser post `text/plain` to a server on this machine without asking first, and
by a name that it controls even JSON. So a request that a browser sends for another origin is refused unless that
origin is allowed, and so is a foreign `Host` on a server that listens on the loopback interface, unless the body
is JSON that no browser sent. Proxies that keep the outer name work, as long as their clients send JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparseray.jobs.http.api_error import ApiError, error_response
from sparseray.log import get_logger

logger = get_logger(__name__)
# What is asked without a key: by those who watch the server.
OPEN_PATHS = ("/health", "/ready", "/ping", "/metrics")
_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Who may ask.

    Args:
        host: address that the server listens on.
        api_keys: one of them must be sent as a bearer token; empty to ask for none.
        cors_origins: origins whose pages may ask, for example `https://chat.example`; "*" for all.
        root_path: path under which a proxy shows the server.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page may ask: of an allowed origin, or of this server itself by a name of its own."""
        if origin in self.cors_origins or "*" in self.cors_origins:
            return True
        own = urlsplit(origin).netloc.lower() == host.lower()
        return own and self.is_own_host(host)

    def is_own_host(self, host: str) -> bool:
        """Whether a `Host` header names this server; one that others reach may have any name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return not _is_loopback(self.host) or name == self.host or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class RequestIds:
    """Gives every request an id (its own `X-Request-Id` if it has one), returns it, and logs the request.

    Args:
        app: what answers.
        root_path: path under which a proxy shows the server.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["root_path"] = self._root_path
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # Answers that are ready go first: of 64 that end in one step, this would be a fifth of the time.
            asyncio.get_running_loop().call_soon(
                logger.log,
                # Those who watch the server ask often and without a body.
                20 if scope["method"] == "POST" else 10,
                "%s %s: %d in %.3f s, request %s",
                scope["method"],
                scope["path"][:100],
                status,
                time.perf_counter() - started,
                request_id,
            )


class Guard:
    """Refuses requests without a key, and those that another site's page sends.

    Args:
        app: what answers the others.
        rules: who may ask.
        open_paths: what is asked without a key.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules, open_paths: Sequence[str] = OPEN_PATHS) -> None:
        self._app, self._rules, self._open_paths = app, rules, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        error = None if scope["type"] == "lifespan" else self._error(scope)
        if error is not None:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers, rules = Headers(scope=scope), self._rules
        host, origin = headers.get("host", ""), headers.get("origin")
        if scope["method"] == "POST":
            is_json = headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"
            if origin is not None and not rules.allows_origin(origin, host):
                message = f"pages of {origin[:100]} may not ask; start the server with --cors_origins {origin[:100]}"
                return ApiError(403, message, code="foreign_origin")
            if origin is None and not is_json and not rules.is_own_host(host):
                message = (
                    f"this server is not {host[:100]!r}; send Content-Type: application/json, or its own name"
                )
                return ApiError(403, message, code="foreign_host")
        path = scope["path"].removeprefix(rules.root_path)
        if rules.api_keys and path not in self._open_paths and not _has_key(headers, rules.api_keys):
            message = "this server needs a key: send Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None


def _has_key(headers: Headers, keys: Sequence[str]) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    sent = given.strip().encode()
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]
    return kind.lower() == "bearer" and any(matches)
