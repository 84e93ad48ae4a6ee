"""The `serve` command: an HTTP ingress here, engines, experts and memory in slots.

The ingress validates a request, sends it to the attention worker with the fewest open requests, and
streams the tokens that come back. Ray starts the slots and is not on the path of a token.
"""

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields
from pathlib import Path

from sparseray.actors.installation import InstallPlan, JobSpec, Restore
from sparseray.actors.serving.messages import Generate, Tokens
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.envelope import INGRESS, SCHEDULER, Body
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Cancel, Failed
from sparseray.errors import SlotLostError, UserError
from sparseray.jobs.http.options import NAMES, HttpOptions, add_options, read_options
from sparseray.log import get_logger
from sparseray.platform import config as configuration
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig
from sparseray.platform.fleet.transport import ZmqTransport, private_directory
from sparseray.platform.metrics.discovery import entries, publish
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.opening import open_serving, serving_inventory, slots_of
from sparseray.platform.planning.replan import make_plan
from sparseray.platform.run import checkpoint

log = get_logger(__name__)

DESCRIPTION = """Serve a checkpoint over HTTP, OpenAI-compatible.

example:
  python -m sparseray serve --checkpoint runs/first/checkpoints/step_100 --port 8000
  curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "def main(", "max_tokens": 32}'
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command until Ctrl-C; 0 after a clean stop, 2 for a user's mistake."""
    parser = configuration.Parser(prog="sparseray serve", description=DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, help="folder such as RUN/checkpoints/step_100")
    parser.add_argument("--port", type=int, default=ServeConfig.port)
    parser.add_argument("--host", default=ServeConfig.host, help="loopback by default")
    add_options(parser)
    parser.add_class_arguments(ServeConfig, "serve", skip={"host", "port"})
    parser.add_class_arguments(ClusterConfig, "cluster")
    known = {"checkpoint", "port", "host", *NAMES, "serve", "cluster"}
    known |= {f"serve.{name.name}" for name in fields(ServeConfig)} - {"serve.host", "serve.port"}
    known |= {f"cluster.{name.name}" for name in fields(ClusterConfig)}
    try:
        configuration.check_keys(arguments, known)
        options = parser.parse_args(list(arguments))
        made = parser.instantiate(options)
        serve = ServeConfig(**{**vars(made.serve), "host": options.host, "port": options.port})
        http = read_options(options, serve.host)
        return run(Path(options.checkpoint).expanduser(), serve, ClusterConfig(**vars(made.cluster)), http)
    except UserError as error:
        return configuration.die(error)


def run(directory: Path, serve: ServeConfig, cluster_config: ClusterConfig, http: HttpOptions) -> int:
    """Check everything, start the slots, and serve.

    Raises:
        UserError: checkpoint, port or cluster do not fit.
    """
    config = open_serving(directory, serve, cluster_config)
    cluster_config = config.cluster
    from sparseray.jobs.http.server import HttpServer, address_url, create_app, listen
    from sparseray.jobs.http.serving_model import read_served
    from sparseray.platform.cluster import Cluster

    listen(serve.host, serve.port).close()
    served = read_served(directory, config, http.model_names)
    print("starting Ray and its slots ...", flush=True)
    inventory = serving_inventory(config)
    cluster = Cluster(cluster_config, slots_of(config, inventory))
    client = None
    try:
        addresses = cluster.start()
        plan = make_plan(
            generation=1,
            addresses=addresses,
            inventory=inventory,
            roles=inventory.roles(cluster_config),
            replication=cluster_config.replication,
            colocated=cluster_config.colocated,
        )
        metrics = Metrics({}, declare="server")
        client = RemoteClient(cluster.job, cluster_config, metrics)
        client.install(config, plan, directory)
        app = create_app(client, served, rules=http.rules, record=metrics.record, metrics=metrics.exposition)
        server = HttpServer(
            app,
            host=serve.host,
            port=serve.port,
            drain_s=serve.drain_s,
            certificate=http.certificate,
            key=http.key,
        )
        address = address_url(serve.host, server.port).removeprefix("http://")
        publish(cluster.job, entries(cluster.metric_targets() | {"server": address}, http.model_names[0]))
        names = " and ".join(map(repr, http.model_names))
        hint = (
            f"serving {directory} as {names} at {server.url} (Ctrl-C stops); try:\n"
            f"  curl -s {server.url}/v1/completions -H 'Content-Type: application/json'"
            ' -d \'{"prompt": "import "}\''
        )
        server.run(lambda: print(hint, flush=True))
    finally:
        if client is not None:
            client.close()
        publish(cluster.job, [])
        cluster.stop()
    print("stopped", flush=True)
    return 0


class RemoteClient:
    """`GenerationClient` of the HTTP server, played by the attention workers of a plan.

    Args:
        job: identifier of the job.
        cluster: transport settings and deadline.
        metrics: where request metrics go.
    """

    def __init__(self, job: str, cluster: ClusterConfig, metrics: Metrics) -> None:
        directory = private_directory(job) if cluster.transport == "ipc" else None
        # ZeroMQ sockets belong to one thread: one mailbox receives in a thread, one sends from the event loop.
        self._inbox = Mailbox(ZmqTransport("scheduler", directory, cluster.bind_host), SCHEDULER, job)
        self._outbox = Mailbox(ZmqTransport("ingress", directory, cluster.bind_host), INGRESS, job)
        self._deadline_s = cluster.deadline_s
        self._queues: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[TokenEvent | Exception]]] = {}
        self._open: dict[int, set[str]] = {}
        self._heard_s: dict[int, float] = {}
        self._running = True
        self._thread = threading.Thread(target=self._receive, daemon=True, name="ingress")

    def install(self, config: RunConfig, plan: Plan, directory: Path) -> None:
        """Give every slot its roles and state, and wait until all have them.

        Args:
            config: of the model.
            plan: who holds what.
            directory: the checkpoint.

        Raises:
            UserError: a slot could not load its state.
            SlotLostError: a slot did not answer.
        """
        for mailbox in (self._inbox, self._outbox):
            mailbox.adopt(plan.generation)
            mailbox.transport.connect(plan.addresses)
        manifest = checkpoint.read_manifest(directory)
        body = InstallPlan(
            plan=plan,
            job=JobSpec(
                config=json.dumps(configuration.to_dict(config)),
                layout=str(directory.absolute()) if config.model.dse.layers else "",
                layout_sha256=manifest["dse_layout_sha256"],
                serving=True,
                tokenizer=str(directory.absolute() / "tokenizer.json"),
            ),
            scheduler=self._inbox.transport.address,
            step=manifest["step"],
            restore=Restore(checkpoint=str(directory.absolute())),
        )
        for slot in plan.addresses:
            self._inbox.post(slot, body)
        waiting = set(plan.addresses)
        while waiting:
            message = self._inbox.next(self._deadline_s + 60)
            if message is None:
                raise SlotLostError(
                    f"slots {sorted(waiting)} did not take their roles; see the messages above"
                )
            if isinstance(message.body, Failed):
                raise UserError(f"slot {message.source}: {message.body.error}")
            waiting.discard(message.source)
        self._open = {slot: set() for slot in plan.attention}
        self._thread.start()

    def _receive(self) -> None:
        while self._running:
            message = self._inbox.next(0.5)
            if message is not None:
                self._heard_s[message.source] = time.monotonic()
                self._take(message.source, message.body)

    def _take(self, slot: int, body: Body) -> None:
        """Hand what a slot said to those who wait for it."""
        if isinstance(body, Tokens):
            for event in body.events:
                self._put(event.request_id, event)
        elif isinstance(body, Failed):
            log.error("slot %d failed: %s", slot, body.error)
            for request_id in list(self._open.get(slot, ())):
                self._put(request_id, SlotLostError(f"slot {slot}: {body.error}"))

    def _put(self, request_id: str, item: TokenEvent | Exception) -> None:
        found = self._queues.get(request_id)
        if found is not None:
            loop, queue = found
            loop.call_soon_threadsafe(queue.put_nowait, item)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield a request's tokens as they come; closing the generator cancels it.

        Raises:
            SlotLostError: its worker failed or fell silent.
        """
        slot = min(self._open, key=lambda s: (len(self._open[s]), s))
        queue: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self._queues[request.request_id] = (asyncio.get_running_loop(), queue)
        self._open[slot].add(request.request_id)
        is_ended = False
        try:
            self._outbox.post(slot, Generate(request=request))
            while not is_ended:
                event = await self._next_event(queue, slot)
                is_ended = event.finish_reason not in (None, "error")
                yield event
        finally:
            if not is_ended:
                self._outbox.post(slot, Cancel(request_id=request.request_id))
            self._queues.pop(request.request_id, None)
            self._open[slot].discard(request.request_id)

    async def _next_event(self, queue: "asyncio.Queue[TokenEvent | Exception]", slot: int) -> TokenEvent:
        while True:
            try:
                event = await asyncio.wait_for(queue.get(), self._deadline_s)
            except TimeoutError:
                # A request that waits for a place in a batch that moves is not lost.
                if time.monotonic() - self._heard_s.get(slot, 0.0) < self._deadline_s:
                    continue
                raise SlotLostError(f"slot {slot} sent nothing for {self._deadline_s:g} s") from None
            if isinstance(event, Exception):
                raise event
            return event

    async def cancel(self, request_id: str) -> None:
        """End a request at its worker; unknown ones are ignored."""
        for slot, ids in self._open.items():
            if request_id in ids:
                self._outbox.post(slot, Cancel(request_id=request_id))

    @property
    def is_healthy(self) -> bool:
        """Whether answers are received."""
        return self._running and self._thread.is_alive()

    def close(self) -> None:
        """Stop receiving and release the sockets."""
        self._running = False
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._inbox.transport.close()
        self._outbox.transport.close()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
