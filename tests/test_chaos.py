"""Random faults against a real run, some seconds of them and a minute; tests/chaos.py runs the same for hours."""

from pathlib import Path

import pytest
from chaos import chaos


def check(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, least: int) -> None:
    monkeypatch.setenv("SPARSERAY_STATE_DIR", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A fixed seed: CI must say the same twice. Other seeds are for runs by hand.
    done = chaos(folder, corpus, seed=20261123, seconds=seconds)
    assert len(done) >= least, done


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_random_faults_change_no_bit(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(corpus, tmp_path, monkeypatch, seconds=15.0, least=2)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(280)
def test_a_minute_of_random_faults_changes_no_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(corpus, tmp_path, monkeypatch, seconds=60.0, least=5)
