"""A slot's part in a round, as kernels do it, in the interpreter: the other slot is memory that has everything already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from test_kernels_moe import distinct_ids, layer
from torch import Tensor

from sparseray.actors.peers.device_rounds import DeviceLayers, RoundTables
from sparseray.actors.peers.in_rounds import NOBODY
from sparseray.actors.peers.regions import Regions, Sizes
from sparseray.actors.peers.table import Table
from sparseray.errors import SlotLostError, SupersededError
from sparseray.kernels import peer
from sparseray.kernels.ops import REFERENCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
C, K, H, I, E, LAYERS, GENERATION = 8, 2, 40, 16, 8, 2, 3
SLOTS = (4, 9)
HERE = {4: (0, 1, 2, 3), 9: (4, 5, 6, 7)}


class Pair:
    """Slot 4, and slot 9's memory.

    Args:
        far: how far slot 9 has come.
    """

    def __init__(self, far: int) -> None:
        torch.manual_seed(0)
        sizes = Sizes(slots=4, tokens=C, top_k=K, hidden=H, returned=K, dtype=torch.float32, nodes=0, dense=0,
                      dense_slice=0, shares=0)  # fmt: skip
        buffers = [torch.zeros(sizes.num_bytes, dtype=torch.uint8, device=DEVICE) for _ in SLOTS]
        self.mine, self.theirs = regions = tuple(sizes.cut(buffer) for buffer in buffers)
        for region in regions:
            region.ids_STK.fill_(NOBODY)
        self.slabs = [[t.to(DEVICE) for t in layer(C, E, K, H, I)[2:]] for _ in range(LAYERS)]
        own = list(HERE[4])
        experts = SimpleNamespace(
            device=DEVICE,
            config=SimpleNamespace(moe=SimpleNamespace(num_experts=E)),
            # Of what it backs up nothing is computed.
            slabs=[
                SimpleNamespace(
                    rows={e: r for r, e in enumerate([*own, 6])},
                    compute=[s[[*own, 6]].contiguous() for s in pair],
                )
                for pair in self.slabs
            ],
            computed={(index, e): 0 for index in range(LAYERS) for e in own},
        )
        self.signs = peer.new_state(DEVICE), peer.new_end(DEVICE)
        tables = RoundTables(cast(Any, experts), self.signs)
        table = Table(slots=SLOTS, regions=dict(zip(SLOTS, cast(tuple[Regions, ...], regions))))
        plan = SimpleNamespace(expert_primaries=SLOTS)
        tables.enter(cast(Any, plan), cast(Any, experts), table, 4, GENERATION)
        self.layers = DeviceLayers(cast(Any, experts), tables, table, 4, is_owner=True, deadline_s=1e-3)
        self.mine.flags_S[1] = (GENERATION << 32) + far

    def row(self, index: int, x_H: Tensor, expert: int) -> Tensor:
        ids, one = torch.tensor([[expert]], device=DEVICE), torch.ones(1, 1, device=DEVICE)
        return REFERENCE.experts(x_H[None], ids, one, *self.slabs[index])[0]


@pytest.mark.parametrize(("own", "others"), [(3, 5), (0, 8), (8, 0)])
def test_a_round_gives_every_token_the_rows_of_its_experts(own: int, others: int) -> None:
    pair = Pair(100)
    for index in range(LAYERS):
        x, ids = torch.randn(own, H, device=DEVICE), distinct_ids(C, E, K)[:own].int().to(DEVICE)
        x9, ids9 = torch.randn(others, H, device=DEVICE), distinct_ids(C, E, K)[:others].int().to(DEVICE)
        pair.mine.x_STH[1, :others], pair.mine.ids_STK[1, :others] = x9, ids9
        for t in range(own):
            for k in range(K):
                if int(ids[t, k]) in HERE[9]:
                    pair.mine.rows_RH[t * K + k] = pair.row(index, x[t], int(ids[t, k]))
        pair.theirs.rows_RH.fill_(7.0)
        found = pair.layers.run(index, (x, ids) if own else None)
        assert (found is None) == (own == 0)
        for t in range(own):
            for k in range(K):
                assert found is not None
                torch.testing.assert_close(found[t, k], pair.row(index, x[t], int(ids[t, k])))
        for t in range(others):
            for k in range(K):
                expert, came = int(ids9[t, k]), pair.theirs.rows_RH[t * K + k]
                wanted = pair.row(index, x9[t], expert) if expert in HERE[4] else torch.full_like(came, 7.0)
                torch.testing.assert_close(came, wanted)
        assert torch.equal(pair.theirs.x_STH[0, :own], x) and torch.equal(pair.theirs.ids_STK[0, :own], ids)
        assert (pair.theirs.ids_STK[0, own:] == NOBODY).all()
        assert pair.theirs.flags_S.tolist() == [(GENERATION << 32) + 2 * index + 2, 0, 0, 0]
    pair.layers.end()
    assert pair.signs[0][:2].tolist() == [peer.OK, (GENERATION << 32) + 2 * LAYERS]
    pair.layers.check(int(pair.signs[0][0]))


def test_a_round_without_the_other_leaves_a_status_and_is_judged() -> None:
    pair = Pair(1)
    x, ids = torch.randn(2, H, device=DEVICE), distinct_ids(2, E, K).int().to(DEVICE)
    pair.layers.run(0, (x, ids))
    with pytest.raises(SlotLostError, match=r"slots \[9\]"):
        pair.layers.check(int(pair.signs[0][0]))
    pair = Pair(1)
    pair.layers.abort()
    pair.layers.run(0, (x, ids))
    with pytest.raises(SupersededError):
        pair.layers.check(int(pair.signs[0][0]))


def test_a_rehearsal_says_nothing_and_leaves_nothing() -> None:
    pair = Pair(0)
    before = pair.signs[0].clone()
    with pair.layers.rehearsed():
        pair.layers.run(0, (torch.randn(2, H, device=DEVICE), distinct_ids(2, E, K).int().to(DEVICE)))
        pair.layers.end()
    assert (
        torch.equal(pair.signs[0], before) and not pair.theirs.flags_S.any() and not pair.theirs.x_STH.any()
    )


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_graphs_of_two_slots_wait_for_each_other_and_go_on_without_one_in_the_next_generation() -> None:
    """Both on one GPU, in a stream each; the same graphs in all rounds and generations."""
    pair = Both()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for own in range(3):
        for side in pair.sides:
            side.fill(3 + own, range(E))
        for side, stream in zip(pair.sides, streams):
            with torch.cuda.stream(stream):
                side.graph.replay()
                side.idle.replay()
        torch.cuda.synchronize()
        for side in pair.sides:
            assert side.state.tolist()[:2] == [peer.OK, (GENERATION << 32) + 4 * LAYERS * (own + 1)]
            side.check()
    left = pair.sides[0]
    # What the lost one computed and this one backs up.
    pair.enter(left, GENERATION + 1, (SLOTS[0],), (*HERE[4], 6))
    left.fill(5, (*HERE[4], 6))
    left.graph.replay()
    torch.cuda.synchronize()
    assert left.state.tolist()[:2] == [peer.OK, (GENERATION + 1 << 32) + 2 * LAYERS]
    left.check()


class Side:
    """One slot: its weights, its layers, and graphs of a round with 6 tokens and with none."""

    graph: torch.cuda.CUDAGraph
    idle: torch.cuda.CUDAGraph

    def __init__(self, slot: int, slabs: list[list[Tensor]], held: tuple[int, ...]) -> None:
        self.slot, self.slabs = slot, slabs
        self.experts = SimpleNamespace(
            device=DEVICE,
            config=SimpleNamespace(moe=SimpleNamespace(num_experts=E)),
            slabs=[
                SimpleNamespace(
                    rows={e: r for r, e in enumerate(held)},
                    compute=[s[list(held)].contiguous() for s in pair],
                )
                for pair in slabs
            ],
            computed={},
        )
        self.state, self.end = peer.new_state(DEVICE), peer.new_end(DEVICE)
        self.tables = RoundTables(cast(Any, self.experts), (self.state, self.end))
        self.x = torch.zeros(LAYERS, 6, H, device=DEVICE)
        self.ids = torch.zeros(LAYERS, 6, K, dtype=torch.int32, device=DEVICE)
        self.rows = torch.zeros(LAYERS, 6, K, H, device=DEVICE)

    def capture(self, table: Table) -> None:
        self.layers = DeviceLayers(
            cast(Any, self.experts), self.tables, table, self.slot, is_owner=True, deadline_s=5.0
        )
        with self.layers.rehearsed():
            self.run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        self.idle = self.layers.capture()
        assert self.layers.capture() is self.idle

    def run(self) -> None:
        for index in range(LAYERS):
            found = self.layers.run(index, (self.x[index], self.ids[index]))
            assert found is not None
            self.rows[index].copy_(found)
        self.layers.end()

    def fill(self, seed: int, among: Any) -> None:
        """Other tokens, whose experts are among some."""
        torch.manual_seed(seed + self.slot)
        self.x.copy_(torch.randn(LAYERS, 6, H))
        choices = torch.tensor(list(among))
        for index in range(LAYERS):
            picked = torch.stack([torch.randperm(len(choices))[:K] for _ in range(6)])
            self.ids[index] = choices[picked].int().to(DEVICE)
        self.rows.fill_(torch.nan)

    def check(self) -> None:
        one = torch.ones(1, 1, device=DEVICE)
        for index in range(LAYERS):
            for t in range(6):
                for k in range(K):
                    expert = self.ids[index, t, k].long().view(1, 1)
                    wanted = REFERENCE.experts(self.x[index, t][None], expert, one, *self.slabs[index])[0]
                    torch.testing.assert_close(self.rows[index, t, k], wanted, rtol=1e-4, atol=1e-4)


class Both:
    """Two slots of one process, each with memory that the other writes to."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = Sizes(slots=4, tokens=C, top_k=K, hidden=H, returned=K, dtype=torch.float32, nodes=0, dense=0,
                      dense_slice=0, shares=0)  # fmt: skip
        slabs = [[t.to(DEVICE) for t in layer(C, E, K, H, I)[2:]] for _ in range(LAYERS)]
        self.regions = {}
        for slot in SLOTS:
            buffer = torch.zeros(sizes.num_bytes, dtype=torch.uint8, device=DEVICE)
            self.regions[slot] = sizes.cut(buffer)
            self.regions[slot].ids_STK.fill_(NOBODY)
        self.sides = [Side(4, slabs, (*HERE[4], 6)), Side(9, slabs, HERE[9])]
        for side in self.sides:
            self.enter(side, GENERATION, SLOTS, HERE[side.slot])
            side.capture(Table(slots=SLOTS, regions=self.regions))

    def enter(self, side: Side, generation: int, slots: tuple[int, ...], computed: tuple[int, ...]) -> None:
        side.experts.computed = {(index, e): 0 for index in range(LAYERS) for e in computed}
        table = Table(slots=slots, regions={slot: self.regions[slot] for slot in slots})
        plan = SimpleNamespace(expert_primaries=slots)
        side.tables.enter(cast(Any, plan), cast(Any, side.experts), table, side.slot, generation)
