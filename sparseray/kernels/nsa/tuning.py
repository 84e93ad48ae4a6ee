"""Launch parameters of the NSA kernels: how many rows and keys a program takes, warps and pipeline stages.

One entry a kernel; chosen by measurement on H100 and H200 (docs/kernels.md, section NSA). `rows` counts query
tokens times query heads of one group; a program never takes less than one query token. `programs` is how many
programs the split of long tiles, table rows or paged sequences aims at, `split` the fewest query tokens of a
part, `part` the fewest table entries of one, `fewest` and `splits` the fewest and the most parts of a sequence.
"""

LAUNCH: dict[str, dict[str, int]] = {
    "range_fwd": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 3},
    "range_pipelined": {"keys": 128, "num_stages": 2},
    "window_pipelined": {"keys": 64, "num_stages": 4},
    "range_pipelined_dq": {"keys": 64, "num_stages": 4},
    "window_pipelined_dq": {"keys": 64, "num_stages": 4},
    "range_pipelined_dkdv": {"keys": 128, "num_stages": 2, "split": 512, "programs": 2112},
    "window_pipelined_dkdv": {"keys": 128, "num_stages": 2, "split": 512, "programs": 0},
    "window_fwd": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 3},
    "range_dq": {"rows": 128, "keys": 128, "num_warps": 8, "num_stages": 2},
    "window_dq": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
    "range_dkdv": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2, "split": 512, "programs": 3072},
    "window_dkdv": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2, "split": 512, "programs": 0},
    "score": {"rows": 128, "keys": 64, "num_warps": 4, "num_stages": 2, "chunk": 8192},
    "score_small": {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 3, "chunk": 8192},
    "top_n": {"num_warps": 1},
    "selected_fwd": {"keys": 64, "num_warps": 2, "num_stages": 2},
    "selected_fwd_bulk": {"keys": 32, "num_warps": 1, "num_stages": 5},
    "selected_dq": {"keys": 64, "num_warps": 2, "num_stages": 2},
    "selected_dq_bulk": {"keys": 32, "num_warps": 1, "num_stages": 2},
    "selected_dkdv": {"rows": 64, "num_warps": 4, "num_stages": 3, "part": 512, "programs": 4096},
    "selected_pipelined_dkdv": {"num_stages": 4, "part": 512, "programs": 2048},
    "block_fwd": {"rows": 64, "num_warps": 4, "num_stages": 1, "part": 512},
    "block_bwd": {"rows": 32, "num_warps": 4, "num_stages": 3, "part": 512, "programs": 4096},
    "decode": {
        "keys": 64,
        "splits": 32,
        "compressed": 396,
        "fewest": 3,
        "window": 128,
        "selected": 384,
        "scores": 1024,
        "piece": 128,
        "best": 128,
        "scored": 4,
        "merges": 256,
        "num_warps": 4,
        "num_stages": 3,
        "selected_stages": 3,
    },
    "decode_single": {
        "keys": 64,
        "splits": 32,
        "compressed": 396,
        "fewest": 3,
        "window": 128,
        "selected": 384,
        "scores": 1024,
        "piece": 128,
        "best": 128,
        "scored": 4,
        "merges": 256,
        "num_warps": 4,
        "num_stages": 3,
        "selected_stages": 3,
    },
    "combine": {"rows": 64, "num_warps": 4},
}


WIDE: dict[str, dict[str, int]] = {
    "range_fwd": {"rows": 128, "keys": 128, "num_warps": 8, "num_stages": 2},
    "window_fwd": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
    "range_dq": {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    "window_dq": {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    "range_dkdv": {"rows": 64, "keys": 128, "num_warps": 8, "num_stages": 2},
    "window_dkdv": {"rows": 32, "keys": 64, "num_warps": 4, "num_stages": 2},
    "score": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
    "score_small": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
    "selected_dkdv": {"rows": 32, "num_warps": 4, "num_stages": 2},
    "block_fwd": {"rows": 64, "num_warps": 4, "num_stages": 2},
    "block_bwd": {"rows": 32, "num_warps": 4, "num_stages": 2},
}
"""What differs where a row of keys is more than 256 bytes."""


def launch_for(name: str, width: int, item_size: int) -> dict[str, int]:
    """Launch parameters of a kernel; others for wide heads, and small tiles where fp32 would not fit shared memory.

    Args:
        width: the larger of the key and value head sizes.
        item_size: bytes of one element.
    """
    launch, row = LAUNCH[name], width * item_size
    if row <= 256:
        return launch
    if item_size == 2:
        launch = launch | WIDE.get(name, {})
    most = {"keys": 64, "num_stages": 2} if row <= 512 else {"keys": 32, "rows": 32, "num_stages": 1}
    if item_size == 2 and row <= 384:
        most = {}
    return {k: min(v, most.get(k, v)) for k, v in launch.items()}
