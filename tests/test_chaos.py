"""A minute of random faults against a real run; tests/chaos.py runs the same for hours."""

from pathlib import Path

import pytest
from chaos import chaos


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_random_faults_change_no_bit(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSERAY_STATE_DIR", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A fixed seed: CI must say the same twice. Other seeds are for runs by hand.
    done = chaos(tmp_path, corpus, seed=20261123, seconds=60.0)
    assert len(done) > 4, done
