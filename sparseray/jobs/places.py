"""Places that are not as usual: no home folder or one that cannot be written, a user without a name, a long TMPDIR.

Compilers, Ray and we ourselves keep files in the home folder and sockets in the temporary one. Where that cannot
be, they are told of another folder before any of them is loaded; what the user has set stays.
"""

import os
import pwd
import secrets
import stat
import tempfile
from pathlib import Path

from sparseray.errors import ConfigError

# A socket's path has at most 107 bytes, and Ray's own part of it is up to 67 long.
LONGEST_TEMPORARY = 40
SHORT = "/tmp"


def settle() -> None:
    """Give every place that is missing or cannot be written a substitute, by the environment.

    Raises:
        ConfigError: there is none; it says what to set.
    """
    uid = os.getuid()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        for name in ("USER", "LOGNAME"):
            os.environ.setdefault(name, f"user{uid}")
    _settle_temporary()
    home = os.path.expanduser("~")
    if os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return
    own = _own_folder(Path(tempfile.gettempdir()) / f"sparseray-home-{uid}")
    if home == "~":
        os.environ["HOME"] = str(own)
    for name, folder in (
        ("SPARSERAY_STATE_DIR", "state"),
        ("XDG_CACHE_HOME", "cache"),
        ("XDG_CONFIG_HOME", "config"),
        ("MPLCONFIGDIR", "matplotlib"),
        ("NUMBA_CACHE_DIR", "numba"),
        ("TRITON_HOME", "triton"),
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ):
        os.environ.setdefault(name, str(own / folder))
    _settle_token(own / "ray_token")


def _settle_temporary() -> None:
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(
            f"no temporary folder can be written ({error}); set TMPDIR to one that can"
        ) from None
    if len(os.fsencode(temporary)) <= LONGEST_TEMPORARY:
        return
    if not os.access(SHORT, os.W_OK | os.X_OK):
        raise ConfigError(
            f"TMPDIR={temporary} is too long for the sockets in it, and {SHORT} cannot be written; set TMPDIR to a "
            f"folder whose name has at most {LONGEST_TEMPORARY} bytes"
        )
    os.environ["TMPDIR"] = SHORT
    tempfile.tempdir = None


def _own_folder(path: Path) -> Path:
    """Make a folder for this user alone, or see that it is one."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"neither the home folder nor {path} can be written ({error.strerror}); set HOME to a folder that can"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path} is not a folder of yours alone; remove it, or set HOME to a folder of yours"
        )
    return path


def _settle_token(path: Path) -> None:
    """Have Ray find the token with which it guards a cluster: it keeps that in the home folder otherwise."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.replace(temporary, path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
