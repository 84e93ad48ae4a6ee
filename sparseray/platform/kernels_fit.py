"""Whether the kernels of a GPU take a model, and whether what compiles them is there: asked before anything is started."""

import re

from sparseray.errors import ConfigError
from sparseray.kernels.settings import nsa_complaint
from sparseray.platform.config import RunConfig

TRITON = (3, 6)
"""The oldest whose compiler takes all kernels."""
FUSED_CHANNELS = 256
"""Of a head that torch's FlashAttention takes; with wider ones it would keep all scores."""


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
    """See that the kernels take the sizes of a model, and torch's fused attention those of its other layers.

    Raises:
        ConfigError: they do not.
    """
    model, complaints = config.model, []
    if "nsa" in model.attention and config.kernels != "reference":
        heads, widths = (model.num_heads, model.num_kv_heads), (model.head_dim, model.value_dim)
        complaints.append(("native sparse attention", nsa_complaint(heads, widths, model.nsa.select_block)))
    if "full" in model.attention:
        names = {"model.head_dim": model.head_dim, "model.v_head_dim": model.value_dim}
        complaints.append(("full attention", _too_wide(names)))
    if "mla" in model.attention:
        names = {
            "model.mla.qk_nope_head_dim": model.mla.qk_head_dim,
            "model.mla.v_head_dim": model.mla.v_head_dim,
        }
        complaints.append(("latent attention", _too_wide(names)))
    for what, said in complaints:
        if said:
            raise ConfigError(f"cluster.device=cuda: {what} takes {said}, or cluster.device=cpu")


def _too_wide(widths: dict[str, int]) -> str:
    """The complaint about heads by setting; empty where none is too wide."""
    cure = " and ".join(f"{name}=128" for name, width in widths.items() if width > FUSED_CHANNELS)
    return (
        f"heads of at most {FUSED_CHANNELS} channels, not {max(widths.values())}; set {cure}" if cure else ""
    )
