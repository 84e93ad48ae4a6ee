"""Whether a Ray answers at an address: asked before Ray is, which would try for long."""

import os
import socket

HEAD_BYTES = 9
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""The head of a frame of HTTP/2: length, kind (4), flags, stream."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS


def why_silent(address: str, timeout_s: float) -> str:
    """Say why no Ray answers at an address; empty if one does.

    Ray itself tries for half a minute and more to reach one that is gone, and fills the terminal meanwhile. Its head
    speaks gRPC, so it answers the first words of HTTP/2 with its settings.

    Args:
        address: HOST:PORT.
        timeout_s: seconds that it has to answer.
    """
    host, _, port = address.rpartition(":")
    answer = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as link:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return ""
            link.sendall(HELLO)
            while len(answer) < HEAD_BYTES and (piece := link.recv(HEAD_BYTES - len(answer))):
                answer += piece
    except (OSError, OverflowError, ValueError) as error:
        return str(error)
    return "" if answer[3:4] == SETTINGS[3:4] else "it is no Ray"
