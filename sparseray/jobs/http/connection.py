"""One connection: uvicorn's, with limits of time and an answer for clients that have finished writing.

uvicorn ends a connection only between two requests. Here the head of a request has a deadline too, counted from
its first byte whatever dribbles in after it, and so has the rest of a body that was answered before it came.
A client may close its side once its request is sent; it still gets its answer. Whether it has gone altogether
is found out by a line that HTTP lets it skip (102): a peer that is not there any more answers with a reset.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import is_ssl

from sparseray.jobs.http.limits import ConnectionLimits


class Connection(H11Protocol):
    """A connection with deadlines; see `connection_class`."""

    header_timeout_s = idle_timeout_s = 0.0
    _deadline: asyncio.TimerHandle | None = None
    _state = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; the first request must come soon."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._set("lost", None)
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Stay open while an answer is due to a client that has sent all it wanted."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or is_ssl(self.transport):
            return None
        cycle.keep_alive = False
        if cycle.scope["http_version"] == "1.1":
            self._probe(0.1)
        return True

    def _probe(self, seconds: float) -> None:
        """Send a line that may be skipped, again and again: the first after a reset ends the connection."""
        if self.conn.our_state is h11.SEND_RESPONSE and not self.transport.is_closing():
            line = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
            self.transport.write(self.conn.send(line))
            self.loop.call_later(seconds, self._probe, min(10.0, 2 * seconds))

    def _watch(self) -> None:
        """Set the deadline of what the client has to do next; more bytes of the same do not move it."""
        if self.transport.is_closing():
            self._set("lost", None)
        elif self.cycle is not None and not self.cycle.response_complete:
            self._set("answering", None)
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            is_new = self.cycle is None
            self._set("idle", self.header_timeout_s if is_new else self.idle_timeout_s)
        else:
            self._set("sending", self.header_timeout_s)

    def _set(self, state: str, seconds: float | None) -> None:
        if state == self._state:
            return
        self._state = state
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self._state == "sending":
            head = [(b"content-length", b"0"), (b"connection", b"close")]
            self.transport.write(
                self.conn.send(h11.Response(status_code=408, headers=head, reason=b"Timeout"))
            )
            self.transport.write(self.conn.send(h11.EndOfMessage()))
        self.transport.close()


def connection_class(limits: ConnectionLimits) -> type[Connection]:
    """Return the class of a server's connections."""
    timeouts = {"header_timeout_s": limits.header_timeout_s, "idle_timeout_s": limits.idle_timeout_s}
    return type("LimitedConnection", (Connection,), timeouts)
