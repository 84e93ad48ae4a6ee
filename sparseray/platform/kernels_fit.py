"""Whether the kernels of a GPU take a model, and whether what compiles them is there: asked before anything is started."""

import re

from sparseray.errors import ConfigError
from sparseray.platform.config import RunConfig

TRITON = (3, 6)
"""The oldest whose compiler takes all kernels."""


def check_triton(what: str, or_else: str) -> None:
    """See that Triton is there, and new enough.

    Args:
        what: setting that asks for kernels, for the message.
        or_else: a further cure.

    Raises:
        ConfigError: it is not.
    """
    cure = f"`pip install 'triton>={TRITON[0]}.{TRITON[1]},<3.8'`, or set cluster.device=cpu{or_else}"
    try:
        import triton
    except ImportError:
        raise ConfigError(
            f"{what}: the kernels are compiled by Triton, which is not installed; {cure}"
        ) from None
    version = str(triton.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and tuple(map(int, found.groups())) < TRITON:
        raise ConfigError(
            f"{what}: Triton {version} is here and the kernels need {TRITON[0]}.{TRITON[1]} or newer; {cure}"
        )


def check_shapes(config: RunConfig) -> None:
    """See that the kernels take the sizes of a model.

    Raises:
        ConfigError: they do not.
    """
