"""The model under evaluation: a checkpoint's weights in this process, behind the engine that serves.

No Ray and no sockets: weights are read and verified, and the same engine as in a server's slot computes every figure,
on a CPU in float32 and on a GPU in bfloat16 as a server does.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.paged_engine import PREFILL_ROWS, PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.state.dense_slab import computes_in_fp32
from sparseray.actors.training.tokenizer_file import load_tokenizer
from sparseray.errors import ConfigError, RunFailedError
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.kernels.ops import ops_for
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig
from sparseray.platform.fleet.job import DTYPES
from sparseray.platform.opening import open_serving
from sparseray.platform.run import checkpoint

BATCH = {"cpu": 16, "cuda": 64}
"""Requests at a time, by device."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that can be asked.

    Args:
        engine: over its weights.
        vocabulary: of its tokenizer.
        context: tokens of a prompt and its answer.
        device: that computes, "cpu" or "cuda".
    """

    engine: Engine
    vocabulary: Vocabulary
    context: int
    device: str = "cpu"

    def answers(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[str, list[TokenEvent]]]:
        """Compute requests and yield each one's events when it is done.

        Raises:
            RunFailedError: the model gave no numbers.
        """
        events: dict[str, list[TokenEvent]] = {}
        waiting = deque(requests)
        while waiting or self.engine.has_work:
            # Not all at once: an engine looks through its queue for every request that it takes.
            while waiting and len(events) < 2 * BATCH[self.device]:
                request = waiting.popleft()
                events[request.request_id] = []
                self.engine.add(request)
            for event in self.engine.step():
                if event.finish_reason == "error":
                    raise RunFailedError(f"request {event.request_id} failed: {event.error}")
                events[event.request_id].append(event)
                if event.finish_reason is not None:
                    yield event.request_id, events.pop(event.request_id)

    def text(self, events: Sequence[TokenEvent]) -> str:
        """The text of an answer."""
        tokens = [event.token_id for event in events if event.token_id is not None]
        return b"".join(self.vocabulary.text_bytes(token) for token in tokens).decode("utf-8", "replace")


def open_subject(directory: Path, context: int, device: str = "cpu") -> Subject:
    """Read a checkpoint.

    Args:
        directory: of the checkpoint.
        context: tokens of a prompt and its answer, 0 for as many as the model has.
        device: that computes: "cpu", "cuda", or "auto" for a GPU where there is one that suits.

    Raises:
        UserError: it is damaged, the model has fewer tokens, or the device does not compute it.
    """
    config = _opened(directory, device)
    longest = config.model.max_seq_len
    if not 0 <= context <= longest:
        raise ConfigError(
            f"--context {context} is outside 1..{longest}, the model's; leave it out, or lower it"
        )
    model, kind = config.model, config.cluster.device
    ops = ops_for(config.kernels, torch.device(kind))
    layout = DSELayout.load(directory) if model.dse.layers else None
    dense, experts = Transformer(model, layout, ops=ops).eval(), LocalExperts(model, ops=ops)
    memory = None if layout is None else LocalMemory(model, layout)
    own = dense.state_dict() | experts.tensors() | ({} if memory is None else memory.state_dict())
    read = checkpoint.read_tensors(directory, list(own))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(read.pop(name))
    _place((dense, experts), torch.device(kind), DTYPES[config.train.dtype])
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    more = {"prefill_chunk": PREFILL_ROWS} if kind == "cuda" else {}
    engine = PagedEngine(
        dense, experts, memory, max_batch=BATCH[kind], max_model_len=context or longest, **more
    )
    vocabulary = Vocabulary(tokenizer, model.dse.document_end_id)
    return Subject(engine=engine, vocabulary=vocabulary, context=context or longest, device=kind)


def _opened(directory: Path, device: str) -> RunConfig:
    """The checkpoint's configuration with the device that is meant, and the dtype that it computes in."""
    cluster = ClusterConfig(device=device, colocated=True)  # type: ignore[arg-type]
    try:
        return open_serving(directory, ServeConfig(), cluster)
    except ConfigError as error:
        raise ConfigError(str(error).replace("cluster.device=", "--device ")) from None


def _place(modules: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Bring weights to a device, in the dtype that a server has them in.

    Args:
        modules: their parameters; table rows stay on the host.
        device: that computes.
        dtype: of all but routers.
    """
    for module in modules:
        module.to(device)
        for name, parameter in module.named_parameters():
            if not computes_in_fp32(name):
                parameter.data = parameter.data.to(dtype)
