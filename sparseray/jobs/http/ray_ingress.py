"""The HTTP application as a Ray Serve deployment: several replicas, each an ingress of its own, behind Ray's proxy.

`serve --serve.ingress ray` deploys it on the cluster of its job. A replica joins the job through the scheduler and sends
requests to engines itself; what one had is lost with it, and nothing of the others. Ray Serve replaces it.
"""

import gc
import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseray.errors import ConfigError, RunFailedError, SchedulerLostError
from sparseray.jobs.http.access import AccessRules
from sparseray.jobs.http.options import HttpOptions
from sparseray.jobs.signals import stops_noted
from sparseray.platform.config import RunConfig

APPLICATION = "sparseray"
JOIN_S, READY_S, STOP_S = 60.0, 20.0, 1.0
BUSIEST = 1_000_000
MOST_WORDS = 800
"""How much a replica takes is our own application's to limit."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What a replica is made from; it travels to where Ray starts one.

    Args:
        job: identifier of the server's job.
        identity: folder of tokenizer and chat template.
        config: of the server.
        names: that requests may ask for.
        rules: who may ask.
    """

    job: str
    identity: Path
    config: RunConfig
    names: tuple[str, ...]
    rules: AccessRules

    def build(self) -> Any:
        """Return the ASGI application, with an ingress that has joined the job."""
        from sparseray.jobs.http.ingress import Ingress
        from sparseray.jobs.http.server import create_app
        from sparseray.jobs.http.serving_model import read_served
        from sparseray.platform.fleet.transport import ZmqTransport, private_directory
        from sparseray.platform.metrics.exporter import Metrics

        cluster = self.config.cluster
        sockets = private_directory(self.job) if cluster.transport == "ipc" else None
        names = ("ingress", "ingress-out")
        inbox, outbox = (ZmqTransport(name, sockets, cluster.bind_host) for name in names)
        number = _join(self.job, inbox.address)
        places = self.config.serve.max_batch
        client = Ingress(self.job, inbox, outbox, cluster.deadline_s, places=places, number=number)
        deadline = time.monotonic() + READY_S
        while client.reason and time.monotonic() < deadline:
            time.sleep(0.05)
        served = read_served(self.identity, self.config, self.names)
        metrics = Metrics({"ingress": str(-number)}, declare="server")
        app = create_app(client, served, rules=self.rules, record=metrics.record, metrics=metrics.exposition)
        # As `HttpServer.run` does.
        gc.freeze()
        return app.asgi


class HttpReplica:
    """What Ray Serve makes a replica of.

    Args:
        replica: says how.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def __serve_build_asgi_app__(self) -> Any:
        return self._replica.build()


def _join(job: str, address: str) -> int:
    """Have the scheduler send routes to an ingress, waiting for one that is being restarted; its number."""
    from sparseray.platform.cluster import JobHandle, ask, find_platform

    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            platform = find_platform()
            number: int = (
                0 if platform is None else ask(JobHandle(platform=platform, job=job), "join", address)
            )
        except SchedulerLostError:
            number = 0
        if number:
            return number
        if time.monotonic() > deadline:
            raise RunFailedError(f"the scheduler of job {job[:8]} did not answer within {JOIN_S:g} s")
        time.sleep(0.1)


def check_options(options: HttpOptions) -> None:
    """See that Ray Serve is there, and that it is asked for nothing that it cannot do.

    Raises:
        ConfigError: it is not, or is.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError(
            "--serve.ingress ray needs Ray Serve, which is not installed; run `pip install 'sparseray[ingress]'`, or leave "
            "the option out"
        )
    if options.admin_port is not None:
        raise ConfigError(
            "--admin_port belongs to one process; with --serve.ingress ray use `sparseray status`, `scale` and Ray Serve's own"
        )


def serve_replicas(
    replica: Replica, options: HttpOptions, announce: Callable[[], None], failure: Callable[[], str]
) -> None:
    """Deploy the application and return once SIGINT or SIGTERM comes, or the server has failed.

    Args:
        replica: what each of them is made from.
        options: of HTTP.
        announce: called once it does.
        failure: why the server answers no more; empty while it does.

    Raises:
        RunFailedError: the replicas do not come up.
    """
    from ray import serve

    configured = replica.config.serve
    http: dict[str, Any] = {"host": configured.host, "port": configured.port}
    if options.certificate is not None:
        http |= {
            "ssl_certfile": str(options.certificate),
            "ssl_keyfile": str(options.key or options.certificate),
        }
    stopping = threading.Event()
    with stops_noted(lambda *_: stopping.set()):
        serve.start(http_options=http, proxy_location="HeadOnly")
        deployment = serve.deployment(
            name="ingress",
            num_replicas=configured.ingress_replicas,
            max_ongoing_requests=BUSIEST,
            graceful_shutdown_timeout_s=configured.drain_s,
            ray_actor_options={"num_cpus": 0},
        )(serve.ingress()(HttpReplica))
        try:
            serve.run(deployment.bind(replica), name=APPLICATION, route_prefix="/")
            announce()
            while not failure() and not stopping.wait(STOP_S):
                pass
        except RuntimeError as error:
            found = serve.status().applications.get(APPLICATION)
            words = [one.message for one in found.deployments.values()] if found is not None else []
            text = " ".join(" ".join([str(error), *words]).split())
            raise RunFailedError(f"Ray Serve did not start the ingress: {text[-MOST_WORDS:]}") from None
        finally:
            serve.shutdown()
