"""Launch parameters of the NSA kernels: how many rows and keys a program takes, warps and pipeline stages.

One entry a kernel; chosen by measurement on an H200 (docs/kernels.md, section NSA). `rows` counts query
tokens times query heads of one group; a program never takes less than one query token.
"""

LAUNCH: dict[str, dict[str, int]] = {
    "range_fwd": {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    "window_fwd": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 3},
    "range_dq": {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    "window_dq": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
    "range_dkdv": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2, "split": 8192},
    "window_dkdv": {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2, "split": 0},
    "score": {"rows": 128, "keys": 128, "num_warps": 8, "num_stages": 2, "chunk": 16384},
    "top_n": {"num_warps": 1},
    "selected_fwd": {"num_warps": 2, "num_stages": 2},
    "selected_dq": {"num_warps": 2, "num_stages": 2},
    "selected_dkdv": {"rows": 64, "num_warps": 4, "num_stages": 3, "chunk": 2048},
    "combine": {"rows": 64, "num_warps": 4},
}
