"""The OpenAI-compatible HTTP server: starlette on uvicorn, in front of any `GenerationClient`.

It listens on the loopback interface unless told otherwise. A stop gives open requests time to end; those that do
not are ended with an error that says so.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sparseray.errors import ConfigError
from sparseray.jobs.http.access import AccessRules, Guard, RequestIds
from sparseray.jobs.http.answer import Record
from sparseray.jobs.http.api_error import ApiError, error_response
from sparseray.jobs.http.connection import connection_class
from sparseray.jobs.http.endpoints import GenerateEndpoints
from sparseray.jobs.http.generation_client import GenerationClient
from sparseray.jobs.http.information import InformationEndpoints
from sparseray.jobs.http.limits import ConnectionLimits
from sparseray.jobs.http.openai_bodies import ServedModel
from sparseray.jobs.signals import stops_noted
from sparseray.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class App:
    """An ASGI application, with what others need of it: whose requests are given time at a stop, who computes them."""

    asgi: Starlette
    generate: GenerateEndpoints | None = None
    client: GenerationClient | None = None
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)


def unrecorded(name: str, value: float, times: int = 1, /, **labels: str) -> None:
    """Take a metric's value where nobody asks for it."""


def create_app(
    client: GenerationClient,
    served: ServedModel,
    *,
    rules: AccessRules | None = None,
    record: Record = unrecorded,
    metrics: Callable[[], bytes] = bytes,
) -> App:
    """Return the application.

    Args:
        client: the engine, near or far.
        served: the model.
        rules: who may ask.
        record: takes the values of request metrics.
        metrics: gives the Prometheus exposition text for `/metrics`; runs in a thread.
    """

    async def refuse(_: Request, error: Exception) -> Response:
        return error_response(error)

    rules = rules or AccessRules()
    generate = GenerateEndpoints(client, served, record)
    tell = InformationEndpoints(client, served, generate, metrics, rules.root_path)
    get, post = ["GET"], ["POST"]
    routes = [
        Route("/v1/completions", generate.completion, methods=post),
        Route("/v1/chat/completions", generate.chat, methods=post),
        Route("/v1/models", tell.models, methods=get),
        Route("/v1/models/{model:path}", tell.one_model, methods=get),
        Route("/tokenize", tell.tokenize, methods=post),
        Route("/detokenize", tell.detokenize, methods=post),
        Route("/tokenizer_info", tell.tokenizer_info, methods=get),
        Route("/health", tell.health, methods=get),
        Route("/ready", tell.ready, methods=get),
        Route("/ping", tell.ping, methods=["GET", "POST"]),
        Route("/load", tell.load, methods=get),
        Route("/version", tell.version, methods=get),
        Route("/metrics", tell.metrics, methods=get),
        Route("/openapi.json", tell.openapi, methods=get),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=rules.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id"],
    )
    middleware = [
        Middleware(RequestIds, root_path=rules.root_path),
        *([cors] if rules.cors_origins else []),
        Middleware(Guard, rules=rules),
    ]
    handlers = {HTTPException: refuse, ApiError: refuse, Exception: refuse}
    asgi = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    return App(asgi, generate, client, served.limits.connection)


class _Server(uvicorn.Server):
    """uvicorn's server, with an end that finishes what it can and says what it could not.

    Args:
        config: of uvicorn.
        generate: whose requests are given time.
        drain_s: how much.
    """

    def __init__(self, config: uvicorn.Config, generate: GenerateEndpoints | None, drain_s: float) -> None:
        super().__init__(config)
        self._generate, self._drain_s = generate, drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, wait for the open requests, end those that are left."""
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self._generate is not None:
            await self._end_requests(self._generate)
        # What is left has not sent its request, or does not read its answer.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await self._wait(lambda: not self.server_state.tasks, 2.0, at_once=False)

    async def _end_requests(self, generate: GenerateEndpoints) -> None:
        await self._wait(lambda: generate.num_open == 0, self._drain_s)
        ended = generate.end_answers()
        if ended:
            logger.warning("%d requests that were still open after %g s were ended", ended, self._drain_s)
        await self._wait(lambda: generate.num_open == 0, 2.0, at_once=False)

    async def _wait(self, done: Callable[[], bool], seconds: float, *, at_once: bool = True) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline and not (at_once and self.force_exit):
            await asyncio.sleep(0.02)


class HttpServer:
    """An application on a socket.

    Args:
        app: from `create_app`.
        host: address to listen on; the loopback interface unless the server is meant for others.
        port: 0 for a free one.
        drain_s: seconds that open requests get at a stop.
        certificate, key: files in PEM for TLS; the key may be in the certificate's file. None for plain HTTP.

    Raises:
        ConfigError: the address cannot be listened on, or the certificate not used.
    """

    def __init__(
        self,
        app: App,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        drain_s: float = 5.0,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        config = uvicorn.Config(
            app.asgi,
            http=connection_class(app.limits),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(app.limits.idle_timeout_s) + 1,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot use the TLS certificate {certificate} with {key}: {error}") from error
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = address_url(host, self.port, is_tls=certificate is not None)
        self._server = _Server(config, app.generate, drain_s)
        self._thread: threading.Thread | None = None

    def run(self, announce: Callable[[], None]) -> None:
        """Serve in the main thread until SIGINT or SIGTERM; a second SIGINT does not wait for open requests.

        Args:
            announce: called once either signal stops the server cleanly. Before that point, and in the moments
                in which uvicorn and asyncio install handlers of their own, an interrupt would be raised wherever
                the interpreter is, a finalizer that swallows it included.
        """
        # What the command has loaded stays: a full collection that looks at it stops every stream for a quarter of a second.
        gc.freeze()
        try:
            with stops_noted(self._server.handle_exit):
                announce()
                self._server.run(sockets=[self._socket])
        finally:
            gc.unfreeze()

    def close(self) -> None:
        """Stop a server that runs in the background."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=30)
        self._socket.close()

    def __enter__(self) -> HttpServer:
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="sparseray-http", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: name or address, IPv4 or IPv6.
        port: 0 for a free one.

    Raises:
        ConfigError: nothing can listen there.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is outside 0..65535; choose another port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(found[4][:2], family=found[0], backlog=512)
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number is not None and number > 0 else error
        shown = address_url(host, port).removeprefix("http://")
        message = f"cannot listen on {shown}: port {port}: {reason}; choose another port or host, or stop who uses it"
        raise ConfigError(message) from error
    # Inherited by connections. asyncio sets it only on sockets that name their protocol, and without it the
    # tokens after the first wait 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_url(host: str, port: int, *, is_tls: bool = False) -> str:
    """Return an address as it stands in a URL: an IPv6 address in brackets."""
    return f"http{'s' if is_tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
