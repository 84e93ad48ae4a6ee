"""Whether the kernels of a GPU take a model, and whether what compiles them is there: asked before anything is started."""

import re

from sparseray.errors import ConfigError
from sparseray.kernels.settings import NSA_CHANNELS, NSA_VALUES, nsa_complaint
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


def check_shapes(config: RunConfig, *, trains: bool) -> None:
    """See that the kernels take the sizes of a model, and torch's fused attention those of its other layers.

    Args:
        config: of a run or a server.
        trains: whether there are gradients, whose order may matter.

    Raises:
        ConfigError: they do not.
    """
    model, complaints = config.model, []
    if "nsa" in model.attention and config.kernels != "reference":
        heads, widths = (model.num_heads, model.num_kv_heads), (model.head_dim, model.value_dim)
        complaints.append(("native sparse attention", nsa_complaint(heads, widths, model.nsa.select_block)))
    # Gradients in one order are of our own kernels, with their limits (kernels/attention/ordered.py).
    limits = _without_order if trains and config.determinism == "bitwise" else _too_wide
    if "full" in model.attention:
        names = {"model.head_dim": model.head_dim, "model.v_head_dim": model.value_dim}
        complaints.append(("full attention", limits(names)))
    if "mla" in model.attention:
        names = {
            "model.mla.qk_nope_head_dim": model.mla.qk_head_dim,
            "model.mla.v_head_dim": model.mla.v_head_dim,
        }
        complaints.append(("latent attention", limits(names)))
    for what, said in complaints:
        if said:
            raise ConfigError(f"cluster.device=cuda: {what} takes {said}, or cluster.device=cpu")


def _too_wide(widths: dict[str, int]) -> str:
    """The complaint about heads by setting; empty where none is too wide."""
    cure = " and ".join(f"{name}=128" for name, width in widths.items() if width > FUSED_CHANNELS)
    return (
        f"heads of at most {FUSED_CHANNELS} channels, not {max(widths.values())}; set {cure}" if cure else ""
    )


def _without_order(widths: dict[str, int]) -> str:
    """The complaint about heads whose gradients would have no order; empty where they have one."""
    if max(widths.values()) <= NSA_CHANNELS and min(widths.values()) <= NSA_VALUES:
        return ""
    cure = " and ".join(f"{name}=128" for name, width in widths.items() if width > NSA_VALUES)
    most = f"heads of at most {NSA_CHANNELS} channels, and values of at most {NSA_VALUES}"
    return f"{most}, not {max(widths.values())}, with determinism=bitwise; set {cure}, or determinism=fast"
