"""What Ray starts as a worker where there is a nursery (nursery.py): asks that for a process and waits for its end.

Runs by itself in an isolated Python, so it needs nothing but the standard library and takes some 15 ms. Where the
nursery is gone, or another environment is wanted than the nursery's, it becomes the Python that Ray had asked for.
"""

import json
import os
import socket
import sys


def main(address: str, python: str, arguments: list[str]) -> int:
    """Have a worker started; returns its exit status.

    Args:
        address: of the nursery's socket.
        python: interpreter to become without it.
        arguments: of the interpreter, those of the worker last.
    """
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(address)
            body = json.dumps(wanted).encode()
            socket.send_fds(link, [len(body).to_bytes(8, "big")], [0, 1, 2])
            link.sendall(body)
            if link.recv(1) == b"+":
                return int(link.recv(8) or 0)
    except OSError:
        pass
    os.execv(python, [python, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
