"""Compiles what a CPU computes with, once, before several processes of tests would each compile it for themselves.

Two steps of training, by message with tables of both kinds of rows and in slabs, and a few tokens of four models: what they
call stays compiled beside the sources. Where it lies there already this takes seconds.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import test_model_cache
from conftest import write_corpus
from local_cluster import MODEL, tiny_run, train
from serving_parts import finish, make_parts, request_of
from test_across_slots import slabs_run
from test_model_cache import ODD, Net, random_tokens
from test_serving_paged_kernels import LATENT

from sparseray.jobs.tokens.prepare import prepare
from sparseray.kernels.compiled_ops import COMPILED


def main() -> None:
    """Train and serve."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "text")
        prepare([str(folder / "text")], folder / "data", vocab_size=300, validation_fraction=0.1)
        by_message = tiny_run(folder / "data", memory_shards=2, expert_shards=2)
        in_slabs = [slabs_run(folder / "data", slots=slots) for slots in (1, 2)]
        halves = replace(MODEL, dse=replace(MODEL.dse, row_dtype="bfloat16"))
        for index, config in enumerate((by_message, replace(by_message, model=halves), *in_slabs)):
            train(folder / str(index), config, stop_after=2)
    for changes in ({}, LATENT):
        engine = make_parts(**changes).engine()
        for index, way in enumerate(({"temperature": 0.0}, {"top_p": 0.9}, {"logprobs": 2})):
            engine.add(request_of(str(index), tuple(range(3, 40 + index)), **way))
        finish(engine)
    for model in (ODD, test_model_cache.LATENT):
        net, tokens = Net(model, COMPILED), random_tokens(71, 1)
        net.full(tokens)
        net.served().text(tokens, [3, 1, 17, 50])


if __name__ == "__main__":
    main()
