"""The `serve` command: checks a checkpoint, starts slots and a scheduler for it, and answers over HTTP.

The ingress (jobs/http/ingress.py) is in this process; engines, experts and memory are in slots, which the scheduler
keeps alive by the same lines as in training. Ray starts them and is not on the path of a token.
"""

import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseray.errors import ConfigError, RunFailedError, SchedulerLostError, UserError
from sparseray.jobs.http.options import NAMES, HttpOptions, add_options, read_options
from sparseray.log import get_logger
from sparseray.platform import config as configuration
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig
from sparseray.platform.fleet.forked_workers import ForkedWorkers, forked_workers
from sparseray.platform.metrics.discovery import entries, publish, state_directory
from sparseray.platform.run.progress import Failure, Progress
from sparseray.platform.run.registry import adopt_platform, is_going_on
from sparseray.platform.settings import expand_path, nearest

if TYPE_CHECKING:
    from sparseray.jobs.http.ingress import Ingress
    from sparseray.jobs.http.openai_bodies import ServedModel

log = get_logger(__name__)

DESCRIPTION = """Serve a checkpoint, or a run and what it learns meanwhile, over HTTP, OpenAI-compatible.

Where the run trains on the platform that the server joins, its weights come straight from its slots, also before its first
checkpoint.

example:
  python -m sparseray serve --checkpoint runs/first/checkpoints/step_100 --port 8000
  curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "def main(", "max_tokens": 32}'
  python -m sparseray serve --run runs/first --serve.follow_every 50
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command until Ctrl-C; 0 after a clean stop, 2 for a user's mistake, 1 if the slots did not come up."""
    parser = configuration.Parser(prog="sparseray serve", description=DESCRIPTION)
    parser.add_argument("--checkpoint", default="", help="folder such as RUN/checkpoints/step_100")
    parser.add_argument("--run", default="", help="run_dir of a run: what it has learned, then what follows")
    parser.add_argument("--port", type=int, default=ServeConfig.port)
    parser.add_argument("--host", default=ServeConfig.host, help="loopback by default")
    add_options(parser)
    parser.add_class_arguments(ServeConfig, "serve", skip={"host", "port"})
    parser.add_class_arguments(ClusterConfig, "cluster")
    known = {"checkpoint", "run", "port", "host", *NAMES, "serve", "cluster"}
    known |= {f"serve.{name.name}" for name in fields(ServeConfig)} - {"serve.host", "serve.port"}
    known |= {f"cluster.{name.name}" for name in fields(ClusterConfig)}
    try:
        _check_keys(arguments, known)
        options = parser.parse_args(list(arguments))
        made = parser.instantiate(options)
        serve = ServeConfig(**{**vars(made.serve), "host": options.host, "port": options.port})
        http = read_options(options, serve.host)
        cluster = ClusterConfig(**vars(made.cluster))
        with forked_workers(cluster) as workers:
            directory, followed = weights_of(options.checkpoint, options.run, serve, cluster.address)
            return run(directory, serve, cluster, http, followed, workers)
    except UserError as error:
        return configuration.die(error)
    except RunFailedError as error:
        configuration.die(error)
        return 1


def weights_of(checkpoint: str, run_dir: str, serve: ServeConfig, address: str) -> tuple[Path | None, str]:
    """The checkpoint to begin with, and the folder of the run to follow; empty for none.

    Args:
        checkpoint, run_dir: as given; one of them is empty.
        serve: says how closely a run is followed.
        address: of the Ray to join; a run that trains there gives its weights before it has a checkpoint: then None.

    Raises:
        ConfigError: neither or both were given, or there is nothing to follow.
    """
    from sparseray.platform.run.folder import RunFolder
    from sparseray.platform.versions import followed, has_ended

    if bool(checkpoint) == bool(run_dir):
        raise ConfigError("give either --checkpoint RUN/checkpoints/step_N, or --run RUN to follow a run")
    if checkpoint:
        return Path(expand_path(checkpoint, "--checkpoint")), ""
    folder = Path(expand_path(run_dir, "--run")).absolute()
    if address and RunFolder(folder).newest_checkpoint() is None and is_going_on(folder):
        return None, str(folder)
    newest = followed(folder)
    if has_ended(newest) and serve.follow_every:
        raise ConfigError(
            f"--run {run_dir}: the run has ended with {newest.name}, and there is nothing to follow; "
            f"serve it by --checkpoint {newest}"
        )
    return newest, str(folder)


def _check_keys(arguments: Sequence[str], known: set[str]) -> None:
    """See that options are known and switches true or false; the parser names none that is near, and takes words."""
    made = {"serve": ServeConfig(), "cluster": ClusterConfig()}
    switches = {f"{section}.{name}": v for section, of in made.items() for name, v in vars(of).items()}
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, _, value = argument[2:].partition("=")
        if argument.startswith("--") and argument != "--help" and name not in known:
            raise ConfigError(f"unknown option --{name}; {nearest(name, known)}")
        value = value or following
        if isinstance(switches.get(name), bool) and value.lower() not in ("true", "false"):
            default = str(switches[name]).lower()
            raise ConfigError(f"--{name} must be true or false, not {value!r} (default: {default})")


def run(
    directory: Path | None,
    serve: ServeConfig,
    cluster_config: ClusterConfig,
    http: HttpOptions,
    followed: str = "",
    workers: ForkedWorkers | None = None,
) -> int:
    """Check everything, start the slots, and serve.

    Args:
        directory: of the checkpoint; None to begin with what the slots of the run that is followed offer.
        serve, cluster_config, http: of the server.
        followed: folder of the run whose later steps are served too; empty for none.
        workers: of a Ray of its own.

    Raises:
        UserError: checkpoint, port or cluster do not fit.
        RunFailedError: the slots did not come up.
    """
    from sparseray.platform.opening import open_followed, open_serving
    from sparseray.platform.run.folder import RunFolder

    if directory is not None:
        config = open_serving(directory, serve, cluster_config)
    else:
        config = open_followed(RunFolder(Path(followed)), serve, cluster_config)
    adopt_platform(config.cluster.address)
    from sparseray.jobs.http.ray_ingress import check_options
    from sparseray.jobs.http.server import listen
    from sparseray.jobs.http.serving_model import read_served

    if serve.ingress == "ray":
        check_options(http)
    listen(serve.host, serve.port).close()
    if http.admin_port:
        listen("127.0.0.1", http.admin_port).close()
    identity = directory or RunFolder(Path(followed)).identity
    served = read_served(identity, config, http.model_names)
    print("starting Ray and its slots ...", flush=True)
    what = followed or str(directory)
    with engines(directory, config, http.model_names[0], followed, workers) as (client, job, scheduler):
        try:
            if serve.ingress == "ray":
                _run_replicas(identity, config, http, job, client, what)
            else:
                _run_here(served, serve, http, job, client, scheduler, what)
        finally:
            publish(job, [])
    print("stopped", flush=True)
    return 0


def _run_here(
    served: "ServedModel",
    serve: ServeConfig,
    http: HttpOptions,
    job: str,
    client: "Ingress",
    scheduler: Any,
    what: str,
) -> None:
    from sparseray.jobs.http.admin import admin_token, create_admin_app
    from sparseray.jobs.http.server import HttpServer, address_url, create_app
    from sparseray.platform.cluster import ask
    from sparseray.platform.metrics.exporter import Metrics

    metrics = Metrics({}, declare="server")
    app = create_app(client, served, rules=http.rules, record=metrics.record, metrics=metrics.exposition)
    server = HttpServer(
        app,
        host=serve.host,
        port=serve.port,
        drain_s=serve.drain_s,
        certificate=http.certificate,
        key=http.key,
    )
    with ExitStack() as stack:
        if http.admin_port is not None:
            token = admin_token(state_directory())
            admin = HttpServer(create_admin_app(app, partial(ask, scheduler), token), port=http.admin_port)
            print(f"admin interface at {stack.enter_context(admin).url}/admin/status", flush=True)
        address = address_url(serve.host, server.port).removeprefix("http://")
        publish(job, entries({"server": address}, http.model_names[0]))
        hint = _hint(what, http.model_names, server.url)
        server.run(lambda: print(hint, flush=True))


def _run_replicas(
    identity: Path, config: RunConfig, http: HttpOptions, job: str, client: "Ingress", what: str
) -> None:
    from sparseray.jobs.http.ray_ingress import Replica, serve_replicas
    from sparseray.jobs.http.server import address_url

    serve, names = config.serve, http.model_names
    url = address_url(serve.host, serve.port, is_tls=http.certificate is not None)
    publish(job, entries({"server": url.split("//")[1]}, names[0]))
    replica = Replica(job=job, identity=identity.absolute(), config=config, names=names, rules=http.rules)
    serve_replicas(replica, http, lambda: print(_hint(what, names, url), flush=True), lambda: client.failure)


def _hint(what: str, model_names: Sequence[str], url: str) -> str:
    return (
        f"serving {what} as {' and '.join(map(repr, model_names))} at {url} (Ctrl-C stops); try:\n"
        f"  curl -s {url}/v1/completions -H 'Content-Type: application/json'"
        ' -d \'{"prompt": "import "}\''
    )


@contextmanager
def engines(
    directory: Path | None,
    config: RunConfig,
    name: str,
    followed: str = "",
    workers: ForkedWorkers | None = None,
) -> Iterator[tuple[Any, str, Any]]:
    """Start slots and scheduler of a server, and end them again; gives ingress, the job's identifier, scheduler.

    Args:
        directory: of the checkpoint; None to begin with what the slots of the run that is followed offer.
        config: of its model, with the server's settings.
        name: that the server's metrics are labelled with.
        followed: folder of the run whose later steps are served too; empty for none.
        workers: of a Ray of its own.

    Raises:
        ClusterError: there is no room.
        UserError, RunFailedError: the slots did not come up.
    """
    from sparseray.jobs.http.ingress import Ingress
    from sparseray.platform.cluster import Cluster
    from sparseray.platform.fleet.transport import ZmqTransport, private_directory
    from sparseray.platform.opening import serving_inventory, slots_of
    from sparseray.platform.serving import Served

    home = state_directory() / "servers" / uuid.uuid4().hex[:12]
    folder = home / re.sub(r"[^\w.-]", "_", name)
    config = replace(config, run_dir=str(folder.absolute()))
    num_slots = slots_of(config, serving_inventory(config))
    cluster = Cluster(config.cluster, num_slots, run_dir=folder, may_borrow=True, workers=workers)
    sockets = private_directory(cluster.job) if config.cluster.transport == "ipc" else None
    inbox, outbox = (ZmqTransport(n, sockets, config.cluster.bind_host) for n in ("ingress", "ingress-out"))
    places = config.serve.max_batch
    client = Ingress(cluster.job, inbox, outbox, config.cluster.deadline_s, places=places)
    try:
        folder.mkdir(parents=True)
        task = Served(
            checkpoint="" if directory is None else str(directory.absolute()),
            ingress=client.address,
            run=followed,
            identity=str(Path(followed) / "identity") if followed else "",
        )
        scheduler = cluster.start_job(configuration.to_dict(config), task)
        watch = Watch(scheduler, client)
        watch.wait_until_ready()
        yield client, cluster.job, scheduler
        watch.stop()
    except BaseException:
        cluster.stop(at_once=True)
        raise
    else:
        cluster.stop()
    finally:
        client.close()
        shutil.rmtree(home, ignore_errors=True)


class Watch:
    """Shows what happens to the slots, tells the scheduler that somebody is there, and the ingress when it ends.

    Args:
        scheduler: of the server.
        client: its ingress.
    """

    def __init__(self, scheduler: Any, client: Any) -> None:
        self._scheduler, self._client = scheduler, client
        self._stopping = threading.Event()
        self._failure: Failure | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True, name="watch")
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Return when there is an engine.

        Raises:
            UserError, RunFailedError: there will be none.
        """
        while self._client.reason:
            if self._failure is not None:
                kind = UserError if self._failure.user else RunFailedError
                raise kind(self._failure.error)
            if not self._thread.is_alive():
                raise RunFailedError("the scheduler ended before any engine was there")
            time.sleep(0.05)

    def stop(self) -> None:
        """Have the scheduler end."""
        from sparseray.platform.cluster import ask

        self._stopping.set()
        self._thread.join(5.0)
        try:
            ask(self._scheduler, "stop")
        except SchedulerLostError as error:
            log.warning("the scheduler cannot be told to stop: %s", error)

    def _follow(self) -> None:
        from sparseray.platform.cluster import ask

        seen, epoch, done = 0, "", False
        while not done and not self._stopping.is_set():
            try:
                state: Progress = ask(self._scheduler, "progress", seen, epoch)
            except SchedulerLostError:
                # Ray restarts it; engines answer meanwhile.
                time.sleep(0.2)
                continue
            for record in state.records:
                if record["event"] not in ("start", "ready"):
                    print(f"*** {record['event']}: {record['text']}", flush=True)
            seen, epoch, done, self._failure = state.seen, state.epoch, state.done, state.failure
        if done:
            self._client.fail(self._failure.error if self._failure else "the scheduler has ended")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
