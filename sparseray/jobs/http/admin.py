"""The interface for orchestrators, on a port of its own: status, drain and scale, with the platform's token.

It listens on loopback only. The token is a file that its owner alone can read, in the user's state folder; whoever
can read it could end the processes too.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sparseray.errors import ConfigError, SchedulerLostError
from sparseray.jobs.http.access import AccessRules, Guard
from sparseray.jobs.http.api_error import ApiError, error_response
from sparseray.jobs.http.fields import parse_json
from sparseray.jobs.http.server import App

ROLES = ("attention", "experts", "memory")
MAX_BODY_BYTES = 4096


def admin_token(folder: Path) -> str:
    """Return the platform's token; the first who asks makes it.

    Raises:
        ConfigError: its file cannot be used, or others can read it.
    """
    path = folder / "admin_token"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f"admin_token-{os.getpid()}")
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            # Whole and once, whoever else does the same now.
            os.link(made, path)
        except FileExistsError:
            pass
        finally:
            made.unlink()
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; chmod 600 it, or remove it for a new token")
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"cannot use {path}: {error}; set SPARSERAY_STATE_DIR to another folder") from error


class _AdminEndpoints:
    """Status, drain, scale.

    Args:
        app: the server's application.
        ask: calls a method of the scheduler; may take long.
    """

    def __init__(self, app: App, ask: Callable[..., Any]) -> None:
        self._generate, self._ask = app.generate, ask
        self._client = app.client

    async def status(self, _: Request) -> Response:
        """Tell what the ingress and the scheduler know."""
        assert self._generate is not None and self._client is not None
        found: dict[str, Any] = {
            "ready": not self._generate.refusal and not self._client.reason,
            "reason": self._generate.refusal or self._client.reason,
            "draining": bool(self._generate.refusal),
            "open_requests": self._generate.num_open,
        }
        try:
            found["scheduler"] = await asyncio.to_thread(self._ask, "status")
        except SchedulerLostError as error:
            found["scheduler"] = {"state": f"lost: {error}"}
        return JSONResponse(found)

    async def drain(self, request: Request) -> Response:
        """Take no more requests, or, with `{"drain": false}`, take them again; what is open goes on."""
        assert self._generate is not None
        wanted = (await _body(request)).get("drain", True)
        if not isinstance(wanted, bool):
            raise ApiError(400, "drain must be true or false", param="drain")
        self._generate.refusal = "the server drains: it finishes what it has" if wanted else ""
        return JSONResponse({"draining": wanted, "open_requests": self._generate.num_open})

    async def scale(self, request: Request) -> Response:
        """Have another number of slots of a role."""
        body = await _body(request)
        role, count = body.get("role"), body.get("count")
        if role not in ROLES:
            raise ApiError(400, f"role must be one of {', '.join(ROLES)}", param="role")
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= 1 << 16:
            raise ApiError(400, "count must be a number of slots", param="count")
        try:
            refused = await asyncio.to_thread(self._ask, "scale", role, count)
        except SchedulerLostError as error:
            raise ApiError(503, f"the scheduler does not answer: {error}; ask again") from error
        if refused:
            raise ApiError(409, refused, code="refused")
        return JSONResponse({"role": role, "count": count})


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body exceeds {MAX_BODY_BYTES} bytes", code="body_too_large")
    return dict(parse_json(bytes(data) or b"{}"))


def create_admin_app(app: App, ask: Callable[..., Any], token: str) -> App:
    """Return the application.

    Args:
        app: the server's, from `create_app`.
        ask: calls a method of the scheduler.
        token: that requests must send.
    """
    endpoints = _AdminEndpoints(app, ask)
    routes = [
        Route("/admin/status", endpoints.status, methods=["GET"]),
        Route("/admin/drain", endpoints.drain, methods=["POST"]),
        Route("/admin/scale", endpoints.scale, methods=["POST"]),
    ]

    async def refuse(_: Request, error: Exception) -> Response:
        return error_response(error)

    guard = Middleware(Guard, rules=AccessRules(api_keys=(token,)), open_paths=())
    handlers = {HTTPException: refuse, ApiError: refuse, Exception: refuse}
    return App(Starlette(routes=routes, middleware=[guard], exception_handlers=handlers))
