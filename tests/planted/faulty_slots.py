"""Slots fail in some call of the exchange of several slots, or while state moves from them or to them.

`SPARSERAY_TEST_FAULTS` has what, one for each slot: `slot:moment:call:kind`, by spaces. A moment is a key of MOMENTS, a
call the number of it since the slot began (where parts are replayed, of `forward` and `backward` there are few); a kind is `stop` (SIGSTOP), `kill`, `illegal` (a kernel that writes to memory
of nobody, which ends its process's use of the GPU), or `raise` (an error that says so, for a CPU). In the folder of
`SPARSERAY_TEST_FAULT_FOLDER` a file named by a slot has `moment kind` of its next fault.
"""

import importlib
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from loading import when_loaded

_FAULTS = {
    int(slot): (moment, int(call), kind)
    for slot, moment, call, kind in (
        fault.split(":") for fault in os.environ.get("SPARSERAY_TEST_FAULTS", "").strip().split()
    )
}
_FOLDER = os.environ.get("SPARSERAY_TEST_FAULT_FOLDER", "")
_COMPANY = "sparseray.platform.fleet.company"
_ACROSS, _EXCHANGE = "sparseray.actors.peers.across", "sparseray.actors.exchange"
MOMENTS = {
    "part": (_ACROSS, "DeviceExchange", "begin"),
    "forward": (_ACROSS, "DeviceExchange", "_forward"),
    "backward": (_ACROSS, "DeviceExchange", "_backward"),
    "sums": (_ACROSS, "DeviceExchange", "_finish"),
    "commit": (_ACROSS, "SlabExperts", "apply"),
    "give": (f"{_EXCHANGE}.chunks", "Giving", "go_on"),
    "take": (f"{_EXCHANGE}.pulls", "_Pulling", "_take"),
}


def _illegal() -> None:
    import torch

    from sparseray.kernels import peer

    device = torch.device("cuda")
    nowhere = torch.tensor([1 << 44], device=device)
    peer.put_all(torch.ones(64, device=device), nowhere, peer.new_state(device))


def _fail(kind: str) -> None:
    if kind == "illegal":
        _illegal()
    elif kind == "raise":
        from sparseray.actors import slot

        slot.is_device_lost = lambda: True
        raise RuntimeError("CUDA error: an illegal memory access was encountered (a test's)")
    else:
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)


def _change(_: Any) -> None:
    calls: Counter[str] = Counter()
    known: dict[str, int] = {}
    for moment, (module, of, method) in MOMENTS.items():
        _wrap(getattr(importlib.import_module(module), of), method, moment, calls, known)


def _wrap(of: type, method: str, moment: str, calls: "Counter[str]", known: dict[str, int]) -> None:
    original = getattr(of, method)

    def call(me: Any, *args: Any, **named: Any) -> Any:
        if type(getattr(me, "mailbox", None)).__module__ == _COMPANY:
            # Rehearsals before a slot serves are no calls of a run.
            return original(me, *args, **named)
        # Experts and who gives do not know their slot; what was called before them does.
        known["slot"] = me.call.mailbox.slot if moment == "take" else getattr(me, "me", known.get("slot", -1))
        calls[moment] += 1
        wanted, number, kind = _FAULTS.get(known["slot"], ("", 0, ""))
        if (moment, calls[moment]) == (wanted, number):
            _fail(kind)
        file = Path(_FOLDER, str(known["slot"]))
        if _FOLDER and file.exists() and file.read_text().split()[0] == moment:
            kind = file.read_text().split()[1]
            file.unlink()
            _fail(kind)
        return original(me, *args, **named)

    setattr(of, method, call)


if _FAULTS or _FOLDER:
    when_loaded(_ACROSS, _change)
