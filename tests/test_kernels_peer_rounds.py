"""Rounds between GPUs: what a slot puts, says, waits for and computes, here with peers that are memory of one process."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from test_kernels_moe import distinct_ids, layer
from torch import Tensor

from sparseray.kernels import peer
from sparseray.kernels import peer_rounds as rounds
from sparseray.kernels.moe.held_rounds import rows_of_held
from sparseray.kernels.ops import REFERENCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Descriptors of bf16 are not read right by the interpreter.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
S, C, K, H, I, E = 3, 12, 2, 40, 16, 7
BASE = 5 << 32


class Peer:
    """One slot's regions."""

    def __init__(self) -> None:
        self.x = torch.full((S, C, H), 99.0, dtype=DTYPE, device=DEVICE)
        self.ids = torch.full((S, C, K), -1, dtype=torch.int32, device=DEVICE)
        self.rows = torch.full((C * K, H), 77.0, dtype=DTYPE, device=DEVICE)
        self.flags = torch.zeros(S, dtype=torch.int64, device=DEVICE)


def tables(peers: list[Peer], me: int, owners: int) -> tuple[Tensor, Tensor, Tensor]:
    """Table, who takes part, and a state in generation 5."""
    table, who = rounds.new_table(S, DEVICE)
    table.copy_(torch.tensor([[t.data_ptr() for t in (p.x[me], p.ids[me], p.rows, p.flags)] for p in peers]))
    who.copy_(torch.tensor([0b111 & ~(1 << me), owners, me]))
    return table, who, torch.tensor([peer.OK, BASE], device=DEVICE)


@pytest.mark.parametrize("T", [0, 1, 11, 12])
def test_tokens_come_to_all_that_hold_experts_and_ids_say_where_they_end(T: int) -> None:
    peers = [Peer() for _ in range(S)]
    table, who, state = tables(peers, 1, 0b110)
    x = torch.randn(T, H, device=DEVICE).to(DTYPE)
    ids = torch.randint(0, E, (T, K), device=DEVICE).int()
    for found in peers:
        found.ids.fill_(3)
    rounds.give(x, ids, C, table, who, state)
    rounds.say(3, rounds.OWNERS, table, who, state)
    for rank, found in enumerate(peers):
        if rank == 0:
            assert (found.x == 99).all() and (found.ids == 3).all()
        else:
            assert torch.equal(found.x[1, :T], x) and (found.x[1, T:] == 99).all()
            assert torch.equal(found.ids[1, :T], ids) and (found.ids[1, T:] == -1).all()
            assert (found.x[[0, 2]] == 99).all() and (found.ids[[0, 2]] == 3).all()
    # Nothing is said to oneself.
    assert [p.flags.tolist() for p in peers] == [[0, 0, 0], [0, 0, 0], [0, BASE + 3, 0]]


@pytest.mark.parametrize(
    ("words", "ended", "wanted"),
    [
        ((0, BASE + 4, BASE + 9), 0, peer.OK),
        ((0, BASE + 4, BASE + 3), 0, peer.LATE),
        ((0, BASE + 4, BASE + 3), peer.ENDED, peer.ENDED),
        ((0, BASE + 4, 6 << 32), 0, peer.ENDED),
        ((0, BASE + 4, (4 << 32) + 50), 0, peer.LATE),
    ],
)
def test_a_wait_is_for_the_generation_that_the_state_names(
    words: tuple[int, ...], ended: int, wanted: int
) -> None:
    peers = [Peer() for _ in range(S)]
    table, who, state = tables(peers, 0, 0b111)
    peers[0].flags.copy_(torch.tensor(words))
    end = peer.new_end(DEVICE)
    end.fill_(ended)
    rounds.wait(4, rounds.OTHERS, peers[0].flags, who, state, end, 200 * peer.POLL_S)
    assert state.tolist() == [wanted, BASE]
    if wanted != peer.OK:
        x, ids = torch.ones(2, H, device=DEVICE).to(DTYPE), torch.ones(2, K, device=DEVICE).int()
        rounds.give(x, ids, C, table, who, state)
        rounds.say(5, rounds.OTHERS, table, who, state)
        rounds.answer(
            x, ids[:, 0].contiguous(), torch.full((1,), 2, device=DEVICE).int(), C * K, table, state
        )
        assert all((p.x == 99).all() and (p.rows == 77).all() and p.flags[0] == 0 for p in peers)


def test_tokens_of_a_slot_that_is_gone_are_answered_to_nobody() -> None:
    peers = [Peer() for _ in range(S)]
    table, _, state = tables(peers, 0, 0b111)
    table[2] = 0
    order = torch.tensor([2 * C * K, 3, C * K], dtype=torch.int32, device=DEVICE)
    y = torch.randn(3, H, device=DEVICE).to(DTYPE)
    rounds.answer(y, order, torch.full((1,), 3, device=DEVICE).int(), C * K, table, state)
    assert torch.equal(peers[0].rows[3], y[1]) and torch.equal(peers[1].rows[0], y[2])
    assert (peers[2].rows == 77).all()


@pytest.mark.parametrize("counts", [(12, 0, 5), (0, 0, 0), (1, 1, 1)])
def test_rows_of_all_slots_come_back_to_their_places(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    peers, here = [Peer() for _ in range(S)], [0, 3, 4]
    table, _, state = tables(peers, 1, 0b111)
    mine = peers[1]
    _x, _, *slabs = layer(C, E, K, H, I, DTYPE)
    for rank, count in enumerate(counts):
        if count:
            mine.x[rank, :count] = torch.randn(count, H, device=DEVICE).to(DTYPE)
            mine.ids[rank, :count] = distinct_ids(count, E, K).int()
    places_E = torch.full((E + 1,), len(here), dtype=torch.int32, device=DEVICE)
    places_E[here] = torch.arange(len(here), device=DEVICE).int()
    own = [slab[here].contiguous() for slab in slabs]
    places = places_E[mine.ids.view(S * C, K).long()]
    found = rows_of_held(mine.x.view(S * C, H), places, *own)
    assert int(found[2]) == int((places < len(here)).sum())
    rounds.answer(*found, C * K, table, state)
    for rank, count in enumerate(counts):
        ids = mine.ids[rank, :count].long()
        wanted = peers[rank].rows.clone().fill_(77.0)
        for t in range(count):
            for k in range(K):
                if int(ids[t, k]) in here:
                    one = torch.ones(1, 1, device=DEVICE)
                    expert = ids[t : t + 1, k : k + 1]
                    wanted[t * K + k] = REFERENCE.experts(mine.x[rank, t : t + 1], expert, one, *slabs)[0]
        torch.testing.assert_close(peers[rank].rows, wanted, rtol=2e-2, atol=2e-2)
