"""Memory that nobody uses any more, given back at once: tensors are in cycles with what held them, as a slot or an exchange."""

import gc

import torch


def free_memory() -> None:
    """Give back what an ended lease, or a rehearsal, had."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
