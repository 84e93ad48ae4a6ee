"""Compile the pipelined kernels of attention for compute capability 9.0 on a machine without a GPU.

Run by test_kernels_hopper.py in a process of its own, as Triton's interpreter replaces the compiler, with the branches: range,
window, selected, latent, dense (dense_compile.py; of all widths with the word "all", and whether recorded or not; "record" records them). Prints a line a kernel, as ptxas_report.py says.
"""

from __future__ import annotations

import sys
from typing import Any

import dense_compile
import ptxas_report
import triton.language as tl
from ptxas_report import print_report
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from sparseray.kernels.attention.latent_decode import PIPELINED
from sparseray.kernels.attention.latent_pipelined import latent_pipelined_kernel
from sparseray.kernels.nsa.range_pipelined import range_pipelined_kernel
from sparseray.kernels.nsa.range_pipelined_dkdv import range_pipelined_dkdv_kernel
from sparseray.kernels.nsa.range_pipelined_dq import range_pipelined_dq_kernel
from sparseray.kernels.nsa.selected_pipelined_backward import selected_pipelined_bwd_kernel
from sparseray.kernels.nsa.tuning import LAUNCH

COMPRESSED = {"KIND": 3, "LEN": 32, "STRIDE": 16, "WIN": 0, "SELECT": 0, "INITIAL": 0, "LOCAL": 0}
WINDOW = {"KIND": 9, "LEN": 1, "STRIDE": 1, "WIN": 512, "SELECT": 64, "INITIAL": 1, "LOCAL": 2}
HEADS = {"H": 4, "G": 16, "GP": 16, "BQ": 4, "DQ": 128, "DV": 128, "HALF": 64}


def descriptor(shape: tuple[int, ...], *, is_flat: bool = False) -> str:
    """The signature of a tile of bf16, or of plain fp32 numbers."""
    if is_flat:
        layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    else:
        layout = NVMMASharedLayout.get_default_for(list(shape), tl.bfloat16)
    return f"tensordesc<{'fp32' if is_flat else 'bf16'}{list(shape)},{layout!r}>"


def kind(name: str, tiles: dict[str, str]) -> str:
    """The type of a run-time argument."""
    if name in tiles:
        return tiles[name]
    if name in ("scale", "scale2"):
        return "fp32"
    if not name.startswith("p_"):
        return "i32"
    pointers = {
        "p_meta": "*i64",
        "p_q": "*bf16",
        "p_turned": "*bf16",
        "p_do": "*bf16",
        "p_o": "*bf16",
        "p_o2": "*bf16",
        "p_dq": "*bf16",
    }
    integers = ("p_tiles", "p_parts", "p_queries", "p_pos")
    return "*i32" if name in integers else pointers.get(name, "*fp32")


def report(
    kernel: Any, constants: dict[str, Any], tiles: dict[str, str], *, num_warps: int = 4, registers: int = 168
) -> None:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind(name, tiles) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    print_report(source, {"num_warps": num_warps, "maxnreg": registers})


def ranges(name: str, sizes: dict[str, Any]) -> None:
    """Forward, query gradient and key gradient of a branch that reads a range of keys."""
    none = {"d_k2": None, "d_v2": None, "p_o2": None, "p_lse2": None, "p_dg2": None}
    alone = none if name == "range" else {}
    for kernel, launch in (
        (range_pipelined_kernel, LAUNCH[f"{name}_pipelined"]),
        (range_pipelined_dq_kernel, LAUNCH[f"{name}_pipelined_dq"]),
    ):
        keys = descriptor((launch["keys"], 128))
        more = {"BN": launch["keys"], "STAGES": launch["num_stages"], "ADD": True}
        report(kernel, HEADS | sizes | alone | more, dict.fromkeys(("d_k", "d_v", "d_k2", "d_v2"), keys))
    launch = LAUNCH[f"{name}_pipelined_dkdv"]
    rows, numbers = descriptor((4, 16, 128)), descriptor((4, 16), is_flat=True)
    keys = descriptor((launch["keys"] // 2, 128))
    tiles = {"d_q": rows, "d_do": rows, "d_lse": numbers, "d_dg": numbers, "d_k": keys, "d_v": keys}
    more = {"BK": launch["keys"], "STAGES": launch["num_stages"]}
    report(range_pipelined_dkdv_kernel, HEADS | sizes | more, tiles)


def selected() -> None:
    """Key gradient of the selected branch."""
    rows, keys = descriptor((16, 64)), descriptor((64, 64))
    stages = LAUNCH["selected_pipelined_dkdv"]["num_stages"]
    report(
        selected_pipelined_bwd_kernel, {**HEADS, "SELECT": 64, "STAGES": stages},
        {"d_q": rows, "d_do": rows, "d_k": keys, "d_v": keys},
    )  # fmt: skip


def latent() -> None:
    """The forms of latent decoding at the sizes of DeepSeek-V3, and at the narrowest where all are wanted."""
    for latents, rotated in dense_compile.sizes((256, 32), widest=(512, 64)):
        for form in PIPELINED:
            tiles = {"d_c": descriptor((form.tokens, latents)), "d_r": descriptor((form.tokens, rotated))}
            sizes = {"BB": 128, "BR": form.rows, "BN": form.tokens, "PAGE": 256, "C": latents, "P": rotated}
            sizes |= {"STAGES": form.num_stages, "W": form.num_warps}
            types = tiles | dict.fromkeys(("p_table", "p_lens"), "*i32")
            report(
                latent_pipelined_kernel, sizes, types, num_warps=form.num_warps, registers=form.num_registers
            )


def main(branch: str) -> None:
    ptxas_report.branch = branch
    if branch == "dense":
        dense_compile.main()
    elif branch == "latent":
        latent()
    elif branch == "selected":
        selected()
    elif branch not in ("all", "record"):
        ranges(branch, COMPRESSED if branch == "range" else WINDOW)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
    if "record" in sys.argv:
        ptxas_report.write_record()
