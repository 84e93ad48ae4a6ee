"""Random faults against a training run and a server on one platform, from a seed: no token and no bit may differ.

They share a pool that has no room left, so what the server gains by `scale` the run lends. As a test it runs for a minute
(tests/test_chaos.py); by hand for as long as one likes:

  PYTHONPATH=.:tests python tests/chaos_platform.py --hours 2 --seed 7 --data DIR
"""

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from chaos import ENDLESS, HANG_S, Chaos, Watched
from chaos_serving import WatchedServer
from local_cluster import tiny_run, train
from processes import of_mark, run, temporary_folder, wait_until

TRAINS = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}
SERVES = {**dict.fromkeys(TRAINS, 2), "standby": 0, "colocated": True}
ROOM = 9
"""Slots of both together."""


class Platform:
    """A platform of its own Ray, with room for the two jobs and no more."""

    def __init__(self, folder: Path, temporary: Path, mark: str) -> None:
        self.log, self.changes = folder / "platform.txt", {"TMPDIR": str(temporary), "SPARSERAY_TEST": mark}
        os.environ["SPARSERAY_STATE_DIR"] = self.changes["SPARSERAY_STATE_DIR"] = str(folder / "state")
        os.environ["RAY_AUTH_MODE"] = "disabled"
        code = run(["up", f"--slots={ROOM}", f"--max_slots={ROOM}"], self.log, **self.changes)
        assert code == 0, self.log.read_text()
        self.address = self.log.read_text().split("own at ", 1)[1].split(",")[0]

    def down(self) -> None:
        code = run(["down"], self.log, **self.changes)
        assert code == 0, self.log.read_text()


def chaos_platform(folder: Path, data: Path, *, seed: int, seconds: float) -> list[str]:
    """Train and serve with random faults for a while, stop both, and compare; returns what was done.

    Raises:
        AssertionError: a stream failed or something differs; the message holds seed, faults and events.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_run(data, steps=ENDLESS, **TRAINS, hang_s=HANG_S, lend=True, lend_return_s=1.0)
    config = replace(config, train=replace(config.train, checkpoint_every=100))
    served = tiny_run(data, steps=2, **SERVES, hang_s=HANG_S)
    checkpoint = train(folder / "served", tiny_run(data, steps=2)).folder.newest_checkpoint()
    assert checkpoint is not None
    with temporary_folder() as temporary:
        trains = Watched(folder / "run", config)
        platform = Platform(folder, temporary, trains.mark)
        trains.address, trains.state = platform.address, folder / "state"
        serves = WatchedServer(
            folder / "server",
            served,
            address=platform.address,
            state=folder / "state",
            mark=trains.mark,
            checkpoint=checkpoint,
        )
        return _hurt(platform, trains, serves, seed, seconds)


def _hurt(platform: Platform, trains: Watched, serves: WatchedServer, seed: int, seconds: float) -> list[str]:
    """Start both jobs and hurt one of them after the other."""
    from sparseray.platform.cluster import connect, detach

    faults = [Chaos(trains, seed, {"attention": (1, 2)}), Chaos(serves, seed + 1, {"attention": (2, 3)})]
    chooser, done = random.Random(seed), [f"seed {seed}"]
    try:
        connect(platform.address)
        for job in (trains, serves):
            job.start()
            job.attach()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not serves.failures:
            for job in (trains, serves):
                job.settled()
            chosen = chooser.choice(faults)
            chosen.done.clear()
            chosen.strike()
            done += [f"{chosen.run.folder.name}, {line}" for line in chosen.done]
        trains.settled(), serves.settled()
        detach()
        serves.finish()
        trains.finish()
        platform.down()
        kinds = [event["kind"] for event in trains.events()]
        done.append(
            f"{kinds.count('lent')} loans, {kinds.count('returned')} returns, {kinds.count('lost')} losses"
        )
        done.append(f"{serves.check()} streams, every token as undisturbed")
        done.append(f"{trains.check()} steps, every loss and the last checkpoint equal to the bit")
        wait_until(lambda: not of_mark(trains.mark), "the end of all processes", 20.0)
    except BaseException as error:
        events = "\n".join(f"{e['step']} {e['kind']}: {e['text']}" for e in trains.events())
        said = serves.log.read_text().splitlines() if serves.log.exists() else []
        words = "\n".join([line for line in said if "access: " not in line][-60:])
        text = f"{error}\n\nfaults:\n" + "\n".join(done)
        raise AssertionError(f"{text}\n\nevents:\n{events}\n\nserver:\n{words}") from error
    finally:
        if hasattr(serves, "ending"):
            serves.ending.set()
        detach()
        for job in (serves, trains):
            job.close()
    return done


def main() -> int:
    """Run by hand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1 / 60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--data", required=True, help="folder made by `data prepare --vocab_size 300`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = options.hours * 3600
        done = chaos_platform(Path(folder), Path(options.data), seed=options.seed, seconds=seconds)
    print("\n".join(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
