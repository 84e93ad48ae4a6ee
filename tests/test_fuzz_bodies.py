"""Bodies around valid ones: none crashes the server, hangs, or is answered wrongly."""

from __future__ import annotations

import asyncio

from fuzz import bodies


def test_no_body_crashes_the_server_or_is_answered_wrongly() -> None:
    statuses, faults = asyncio.run(bodies(1_000_000, seconds=12.0))
    assert not faults, "\n".join(faults[:10])
    assert statuses[200] > 20 and statuses[400] > 20
