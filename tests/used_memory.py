"""Memory that nobody has written to, as it comes where it was used before: whatever reads it gets NaN, or -1."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseray.actors.state.shared_buffer import Buffer


def _used(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def found(*args: object, **named: object) -> Tensor:
        tensor = make(*args, **named)
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(-1)
        return tensor

    return found


def hand_out_used_memory(patch: pytest.MonkeyPatch) -> None:
    """Let torch and the slots' buffers begin with what makes everything that reads it wrong."""
    for of, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        patch.setattr(of, name, _used(getattr(of, name)))
    make = Buffer.__init__

    def made(me: Buffer, *args: object) -> None:
        make(me, *args)  # type: ignore[arg-type]
        me.bytes.fill_(255)

    patch.setattr(Buffer, "__init__", made)
