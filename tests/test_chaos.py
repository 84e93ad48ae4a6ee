"""A minute of random faults against a real run, a real server and both on one platform.

For a run test_elastic_ray.py has the same faults in a fixed order, for a server test_serving_cluster.py. tests/chaos.py,
tests/chaos_serving.py and tests/chaos_platform.py run the same for hours.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import chaos
from chaos_platform import chaos_platform
from chaos_serving import chaos_serving

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


@pytest.mark.parametrize("chaos", [chaos, chaos_serving, chaos_platform], ids=["run", "server", "both"])
def test_a_minute_of_random_faults_changes_no_bit_and_no_token(
    chaos: Callable[..., list[str]], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAY_STATE_DIR", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A fixed seed: the test must say the same twice. Other seeds are for runs by hand.
    done = chaos(tmp_path, corpus, seed=20261123, seconds=60.0)
    assert len(done) >= 5, done
