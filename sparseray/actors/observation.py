"""What a slot tells its metrics after a step: read from the worker, the engine and the states, then forgotten.

Called by roles.py between a step's work and its next message; the objects read here only count.
"""

from sparseray.actors.exchange.protocol import Exchange, Observe
from sparseray.actors.serving.engine import Engine
from sparseray.actors.state.dense import DenseState
from sparseray.actors.training.worker import AttentionWorker


def observe_worker(observe: Observe, worker: AttentionWorker) -> None:
    """Record what a training step left: fetches, and statistics if the step was sampled.

    Args:
        observe: metrics of the slot.
        worker: after the step.
    """
    observe_memory(observe, worker.exchange)
    if worker.noted:
        for name, labels, value in worker.noted:
            observe(name, value, **labels)
        observe_biases(observe, worker.state)
        worker.noted.clear()


def observe_memory(observe: Observe, exchange: Exchange) -> None:
    """Record the fetches of table rows since the last call.

    Args:
        observe: metrics of the slot.
        exchange: that fetched.
    """
    for fetch in exchange.take_fetches():
        observe("dse_fetch_seconds", fetch.seconds)
        observe("dse_rows_total", fetch.addressed)
        observe("dse_unique_row_ratio", sum(fetch.rows_by_tier.values()) / max(1, fetch.addressed))
        for tier, rows in fetch.rows_by_tier.items():
            observe("dse_lookups_total", rows, tier=tier)


def observe_biases(observe: Observe, state: DenseState) -> None:
    """Record the range of the router's biases, by model layer.

    Args:
        observe: metrics of the slot.
        state: dense weights with the routers' biases [E].
    """
    for layer, bias_E in zip(state.model.config.moe_layers, state.biases.values(), strict=True):
        observe("moe_router_bias_range", float(bias_E.max() - bias_E.min()), layer=str(layer))


def observe_queues(observe: Observe, engine: Engine) -> None:
    """Record what an engine has at hand: after a step, and after requests were cancelled.

    Args:
        observe: metrics of the slot.
        engine: that the slot plays.
    """
    stats = engine.stats
    observe("requests_running", stats.running)
    observe("requests_waiting", stats.waiting)
    observe("cache_usage_ratio", engine.cache_usage)


def observe_no_engine(observe: Observe) -> None:
    """Record that a slot has no engine any more, whatever its last one had at hand."""
    for name in ("requests_running", "requests_waiting", "cache_usage_ratio"):
        observe(name, 0)


def observe_engine(observe: Observe, engine: Engine, seconds: float) -> int:
    """Record one step of the serving batch, and return the requests in it.

    Args:
        engine: after the step.
        seconds: that the step took.
    """
    counted = engine.take_counts()
    observe("engine_step_seconds", seconds)
    observe("engine_batch_requests", counted.batch)
    observe_queues(observe, engine)
    for waited in counted.queue_seconds:
        observe("request_queue_seconds", waited)
    for place, drafted in counted.drafted.items():
        observe("drafted_tokens_total", drafted, place=str(place))
        observe("accepted_tokens_total", counted.accepted[place], place=str(place))
    if counted.failed_steps:
        observe("engine_failed_steps_total", counted.failed_steps)
        observe("request_retries_total", counted.retries)
    return counted.batch
