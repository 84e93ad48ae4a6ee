"""A checkpoint's folder becomes what the HTTP side knows of the model."""

from __future__ import annotations

from pathlib import Path

from sparseray.actors.serving.grammar import Grammars
from sparseray.actors.training.tokenizer_file import load_tokenizer
from sparseray.jobs.http.chat import ChatTemplate
from sparseray.jobs.http.fields import table
from sparseray.jobs.http.limits import ApiLimits
from sparseray.jobs.http.openai_bodies import ServedModel
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.platform.config import RunConfig


def read_served(directory: Path, config: RunConfig, names: tuple[str, ...]) -> ServedModel:
    """Return the model that a checkpoint holds.

    Args:
        directory: the checkpoint's.
        config: of the run, with how it is served.
        names: that requests may ask for.

    Raises:
        UserError: the tokenizer or the chat template cannot be used.
    """
    serve, model, template = config.serve, config.model, ChatTemplate.load(directory)
    path, eos_id = directory / "tokenizer.json", model.dse.document_end_id
    limits = ApiLimits(
        max_model_len=serve.max_model_len or model.max_seq_len,
        vocab_size=model.vocab_size,
        max_requests=serve.max_waiting
        + serve.max_batch * max(config.cluster.attention_workers, serve.max_engines),
    )
    return ServedModel(
        names=names,
        vocabulary=Vocabulary(load_tokenizer(path), eos_id, template.begin),
        template=template,
        grammars=Grammars.load(path, vocab_size=model.vocab_size, eos_id=eos_id),
        limits=limits,
        fields=table(limits),
        ignore_unknown=serve.ignore_unknown_fields,
    )
