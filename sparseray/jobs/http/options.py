"""The options of `serve` that are the HTTP server's alone: names, keys, origins, TLS; none of them reaches a slot."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseray.errors import ConfigError

if TYPE_CHECKING:
    from sparseray.jobs.http.access import AccessRules

KEY_VARIABLE = "SPARSERAY_API_KEY"
NAMES = (
    "model_name",
    "api_key",
    "api_key_file",
    "cors_origins",
    "root_path",
    "tls_certificate",
    "tls_key",
    "admin_port",
)


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Checked values of the options below."""

    model_names: tuple[str, ...]
    rules: AccessRules
    certificate: Path | None = None
    key: Path | None = None
    admin_port: int | None = None


def add_options(parser: ArgumentParser) -> None:
    """Add the options to the command's parser."""
    say = parser.add_argument
    say("--model_name", nargs="+", default=["sparseray"], help="names that requests may ask for")
    say("--api_key", default="", help=f"key that requests must send; better from {KEY_VARIABLE} or a file")
    say("--api_key_file", default="", help="file of such keys, one a line")
    say("--cors_origins", nargs="+", default=[], help="origins whose pages may ask; '*' for all")
    say("--root_path", default="", help="path under which a proxy shows the server, for example /llm")
    say("--tls_certificate", default="", help="certificate in PEM, with its chain")
    say(
        "--admin_port", type=int, help="port on loopback for /admin/status, drain and scale; 0 for a free one"
    )
    say("--tls_key", default="", help="its key in PEM, where the certificate's file does not hold it")


def read_options(options: Any, host: str) -> HttpOptions:
    """Check the values.

    Args:
        options: from the parser.
        host: address to listen on.

    Raises:
        ConfigError: one cannot be used.
    """
    from sparseray.jobs.http.access import AccessRules

    if options.tls_key and not options.tls_certificate:
        raise ConfigError("--tls_key needs --tls_certificate; give both")
    for name in ("tls_certificate", "tls_key"):
        path = getattr(options, name)
        if path and not Path(path).expanduser().is_file():
            raise ConfigError(f"--{name} {path} is not a file; give the path of one in PEM")
    if options.admin_port and options.admin_port == options.port:
        raise ConfigError(
            f"--admin_port {options.admin_port} is --port too; choose another, or 0 for a free one"
        )
    root = options.root_path.rstrip("/")
    if root and not re.fullmatch(r"(/[\w.~-]+)+", root):
        raise ConfigError(f"--root_path {options.root_path!r} is not a path; give one such as /llm")
    for origin in options.cors_origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ConfigError(
                f"--cors_origins {origin!r} is not an origin; give one such as https://chat.example"
            )
    names = tuple(dict.fromkeys(options.model_name))
    if not all(names):
        raise ConfigError("--model_name is empty; give the name that requests ask for")
    rules = AccessRules(
        host=host, api_keys=_keys(options), cors_origins=tuple(options.cors_origins), root_path=root
    )
    certificate, key = options.tls_certificate, options.tls_key
    return HttpOptions(
        model_names=names,
        rules=rules,
        certificate=Path(certificate).expanduser() if certificate else None,
        key=Path(key).expanduser() if key else None,
        admin_port=options.admin_port,
    )


def _keys(options: Any) -> tuple[str, ...]:
    keys = [options.api_key, os.environ.get(KEY_VARIABLE, "")]
    if options.api_key_file:
        try:
            keys += Path(options.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read --api_key_file {options.api_key_file}: {error}") from None
        if not any(key.strip() for key in keys):
            raise ConfigError(f"--api_key_file {options.api_key_file} holds no key; write one a line")
    found = tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
    if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
        raise ConfigError("an API key may hold printable ASCII characters only, and no space")
    return found
