"""What all tests share: a tiny corpus, prepared once a session."""

import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import prepare

# Before anything else imports Triton, as transformers does.
prepare()
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing may start a Ray of its own by the way: a process that is connected to one ends when that one is gone.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
# Tests leave nothing in the folder of the user who runs them, and this one ends with them; workers inherit it.
OWN_STATE = "" if "SPARSERAY_STATE_DIR" in os.environ else tempfile.mkdtemp(prefix="sparseray-state-")
os.environ.setdefault("SPARSERAY_STATE_DIR", OWN_STATE)
# Each worker has one of its own in it: what goes on for one of them does not for another.
os.environ["SPARSERAY_STATE_DIR"] += f"/{os.environ.get('PYTEST_XDIST_WORKER', '')}"

WORDS = "rain river stone bread light house under winter green north seven learn sparse hold move".split()  # noqa: SIM905


def write_corpus(folder: Path, *, documents: int = 40, words: int = 160, seed: int = 0) -> None:
    """Write text that depends on the seed alone: every document repeats a few phrases of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for index in range(documents):
        phrases = [" ".join(source.choices(WORDS, k=6)) for _ in range(4)]
        lines = [source.choice(phrases) for _ in range(words // 6)]
        (folder / f"{index:03d}.txt").write_text(".\n".join(lines) + ".\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of a corpus of fixed text, vocabulary 300; read only."""
    from sparseray.jobs.tokens.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text")
    prepare([str(folder / "text")], folder / "data", vocab_size=300, validation_fraction=0.1)
    return folder / "data"


# Before xdist reads the groups; after it, they would count for nothing.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what starts Ray in two groups, each for one worker: of clusters with deadlines, one runs at a time.

    The other group is "starts", of what waits for the end of commands and has no deadline of seconds. Of tests with many
    variants the first of each few is no long one.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if (few := item.get_closest_marker("one_in")) is not None:
            test = item.nodeid.split("[")[0]
            if seen[test] % few.args[0]:
                item.add_marker(pytest.mark.long)
            seen[test] += 1
        if item.get_closest_marker("ray") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("clusters"))


def pytest_unconfigure() -> None:
    """Remove the folder of the tests' state."""
    if OWN_STATE:
        shutil.rmtree(OWN_STATE, ignore_errors=True)


@pytest.fixture(scope="session")
def parts() -> Any:
    """A tiny model with all that an engine needs."""
    from serving_parts import make_parts

    return make_parts()


@pytest.fixture(scope="session")
def service(parts: Any) -> Any:
    """A server over the tiny model, with narrow limits."""
    from serving_parts import serving

    limits = {"max_body_bytes": 20_000, "max_requests": 12, "body_timeout_s": 1.0}
    with serving(parts, limits=limits) as found:
        yield found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly which outside programs were missing, for tests that need them are skipped."""
    for program in ("prometheus", "chromium"):
        if shutil.which(program) is None:
            terminalreporter.write_line(
                f"WARNING: no {program} here; the tests that need it WERE SKIPPED", red=True
            )
