"""Bodies around valid ones: none crashes the server, hangs, or is answered wrongly."""

from __future__ import annotations

import asyncio

import pytest
from fuzz import bodies


@pytest.mark.parametrize("cases", [1_000, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_body_crashes_the_server_or_is_answered_wrongly(cases: int) -> None:
    statuses, faults = asyncio.run(bodies(cases))
    assert not faults, "\n".join(faults[:10])
    assert statuses[200] > 20 and statuses[400] > 20
