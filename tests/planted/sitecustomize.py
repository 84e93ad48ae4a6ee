"""Loaded by every Python process whose path has this folder: what tests plant there, each where its variables ask for it."""

import faulty_slots  # noqa: F401
import held_rename  # noqa: F401
import rested_steps  # noqa: F401
import shared_gpu  # noqa: F401
import small_chunks  # noqa: F401
