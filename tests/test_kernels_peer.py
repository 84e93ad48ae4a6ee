"""Kernels that write to another GPU's memory and wait for what others say; here all of it is one process's memory."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)

from sparseray.kernels import peer, peer_rows
from sparseray.kernels.ops import REFERENCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GENERATION = 5
LATER = (GENERATION + 1) << 32


def word(count: int) -> int:
    return GENERATION << 32 | count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 33), (37, 1024), (3, 2500)])
def test_rows_come_to_their_places(rows: int, width: int, dtype: torch.dtype) -> None:
    source = torch.randint(-99, 99, (rows, width), device=DEVICE).to(dtype)
    order = torch.randperm(2 * rows, device=DEVICE)[:rows].int()
    into = torch.full((2 * rows, width), 7, dtype=dtype, device=DEVICE)
    wanted = into.clone()
    wanted[order.long()] = source
    peer.put_rows(source, into, order, peer.new_state(DEVICE))
    assert torch.equal(into, wanted)
    peer.put_rows(source, into[:rows], None, peer.new_state(DEVICE))
    assert torch.equal(into[:rows], source) and torch.equal(into[rows:], wanted[rows:])


def test_single_numbers_come_to_their_places() -> None:
    source, order = torch.randn(700, device=DEVICE), torch.randperm(900, device=DEVICE)[:700].int()
    into = torch.zeros(900, device=DEVICE)
    peer.put_rows(source, into, order, peer.new_state(DEVICE))
    assert torch.equal(into[order.long()], source) and int((into != 0).sum()) == 700


def test_a_wait_ends_when_all_sources_have_come() -> None:
    flags, state, end = (
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
        peer.new_state(DEVICE),
        peer.new_end(DEVICE),
    )
    peer.signal(flags, 0, word(4), state)
    peer.signal(flags, 2, word(7), state)
    peer.wait(flags, 0b101, word(4), LATER, state, end, 1.0)
    assert int(state[0]) == peer.OK and flags.tolist() == [word(4), 0, word(7)]


def test_words_of_a_graph_that_is_run_again_rise_with_the_count() -> None:
    flags, state, end = (
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        peer.new_state(DEVICE),
        peer.new_end(DEVICE),
    )
    for _ in range(3):
        peer.signal(flags, 0, word(1), state)
        peer.wait(flags, 1, word(1), LATER, state, end, 1.0)
        state[1] += 1
    assert int(state[0]) == peer.OK and flags.tolist() == [word(3)]


@pytest.mark.parametrize("by", [0, 6, -2])
def test_words_of_a_part_that_is_replayed_are_as_far_on_as_the_slot(by: int) -> None:
    """Recorded at a count, replayed at another: what is said and waited for moves by the difference, and what is put does not."""
    flags = [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    state, end, into = peer.new_state(DEVICE), peer.new_end(DEVICE), regions(2, 8)
    numbers = torch.randn(8, device=DEVICE).bfloat16()

    def part(count: int) -> None:
        peer.put_all(numbers, peer.table_of(into, DEVICE), state)
        peer.signal_all(peer.table_of(flags, DEVICE), 1, word(count), state)
        peer.signal(flags[0], 0, word(count + 1), state)
        peer.wait(flags[0], 0b11, word(count), LATER, state, end, 200 * peer.POLL_S)

    state[1] = by
    part(9)
    state[1] = 0
    assert int(state[0]) == peer.OK
    assert flags[0].tolist() == [word(10 + by), word(9 + by)] and flags[1].tolist() == [0, word(9 + by)]
    assert all(torch.equal(place, numbers) for place in into)
    # A launched word that follows is what it says.
    peer.wait(flags[0], 0b10, word(9 + by), LATER, state, end, 200 * peer.POLL_S)
    assert int(state[0]) == peer.OK
    state[1] = by + 1
    peer.wait(flags[0], 0b10, word(9), LATER, state, end, 200 * peer.POLL_S)
    assert int(state[0]) == peer.LATE


@pytest.mark.parametrize(
    ("said", "ended", "wanted"),
    [(word(3), 0, peer.LATE), (LATER | 1, 0, peer.ENDED), (word(3), peer.ENDED, peer.ENDED), (4 << 32 | 9, 0, peer.LATE)],
)  # fmt: skip
def test_a_wait_that_comes_to_no_end_leaves_a_status_and_nothing_is_put_after_it(
    said: int, ended: int, wanted: int
) -> None:
    """Too late; a later generation; the host; an older generation, however far it came."""
    flags = torch.tensor([0, said], dtype=torch.int64, device=DEVICE)
    state, end = peer.new_state(DEVICE), peer.new_end(DEVICE)
    end.fill_(ended)
    peer.wait(flags, 0b10, word(4), LATER, state, end, 200 * peer.POLL_S)
    assert int(state[0]) == wanted
    into = torch.zeros(2, 4, device=DEVICE)
    peer.put_rows(torch.ones(2, 4, device=DEVICE), into, None, state)
    peer.signal(flags, 0, word(9), state)
    assert not into.any() and int(flags[0]) == 0
    peer.wait(flags, 0b10, word(1), LATER, state, end, 1.0)
    assert int(state[0]) == wanted


def regions(sources: int, *shape: int) -> list[torch.Tensor]:
    return [torch.full(shape, 7.0, device=DEVICE).bfloat16() for _ in range(sources)]


def test_numbers_come_to_several_places_and_a_word_after_them() -> None:
    state, numbers = peer.new_state(DEVICE), torch.randn(5000, device=DEVICE).bfloat16()
    into, flags = regions(3, 5000), [torch.zeros(4, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    peer.put_all(numbers, peer.table_of(into, DEVICE), state)
    peer.signal_all(peer.table_of(flags, DEVICE), 2, word(3), state)
    assert all(torch.equal(place, numbers) for place in into)
    assert all(words.tolist() == [0, 0, word(3), 0] for words in flags)
    state[0] = peer.LATE
    peer.put_all(numbers + 1, peer.table_of(into, DEVICE), state)
    peer.signal_all(peer.table_of(flags, DEVICE), 2, word(4), state)
    assert torch.equal(into[0], numbers) and int(flags[0][2]) == word(3)


@pytest.mark.parametrize(
    ("is_weighted", "S", "T", "num"), [(True, 2, 11, 25), (False, 3, 101, 709), (False, 2, 64, 0), (True, 3, 37, 333)]
)  # fmt: skip
def test_rows_and_sums_of_rows_come_to_their_sources(is_weighted: bool, S: int, T: int, num: int) -> None:
    torch.manual_seed(0)
    K, H = 3, 40
    order = torch.randperm(S * T * K, device=DEVICE).int()
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(S * T * K, device=DEVICE).int()
    held, rows = torch.tensor(num, device=DEVICE).int(), torch.randn(S * T * K, H, device=DEVICE).bfloat16()
    rows[num:] = torch.nan
    weights, state = torch.rand(S, T, K, device=DEVICE), peer.new_state(DEVICE)
    for values in (rows, weights.flatten()):
        into = [
            torch.full((T * K, *values.shape[1:]), 7.0, dtype=values.dtype, device=DEVICE) for _ in range(S)
        ]
        wanted = torch.full((S * T * K, *values.shape[1:]), 7.0, dtype=values.dtype, device=DEVICE)
        wanted[order[:num].long()] = values[:num]
        peer_rows.give_rows(values, order, held, peer.table_of(into, DEVICE), T * K, into[0].stride(0), state)
        assert torch.equal(torch.cat(into), wanted)
    placed = torch.zeros(S * T * K, H, device=DEVICE)
    placed[order[:num].long()] = rows[:num].float()
    factors = weights if is_weighted else torch.ones_like(weights)
    wanted = (placed.view(S, T, K, H) * factors[..., None]).sum(2)
    into = [region[:, 1] for region in regions(S, T, 2, H)]
    table = peer.table_of(into, DEVICE)
    peer_rows.give_sums(rows, inverse, weights if is_weighted else None, held, table, (S, T, K), 2 * H, state)
    has_any = (inverse.view(S, T, K) < num).any(2)
    for place, values, is_here in zip(into, wanted, has_any):
        assert torch.allclose(place[is_here].float(), values[is_here], atol=0.05)
        assert (place[~is_here] == 7.0).all(), "nobody waits for a sum of nothing"


@pytest.mark.parametrize(
    ("T", "K", "H", "owners"), [(1, 1, 8, 1), (37, 3, 40, 62), (300, 6, 64, 5), (70, 2, 5000, 2)]
)
@pytest.mark.parametrize("beside", [False, True])
def test_tokens_come_to_those_alone_who_have_experts_of_theirs(
    T: int, K: int, H: int, owners: int, beside: bool
) -> None:
    """And what these give is summed alone, in their order, whatever lies at the others' places."""
    torch.manual_seed(0)
    x_TH, state = torch.randn(T, H, device=DEVICE).bfloat16(), peer.new_state(DEVICE)
    ids_TK = torch.rand(T, 16).topk(K).indices.int().to(DEVICE)
    bits_E = (1 << torch.randint(owners, (16,))).to(DEVICE)
    owners_T = peer_rows.owners_of(ids_TK, bits_E)
    assert torch.equal(owners_T, REFERENCE.owners_of(ids_TK, bits_E))
    into = regions(owners, T, H)
    peer_rows.put_tokens(x_TH, owners_T, peer.table_of(into, DEVICE), state, beside=beside)
    is_owner_TO = torch.stack([(owners_T >> i & 1).bool() for i in range(owners)], 1)
    for place, is_its in zip(into, is_owner_TO.T):
        assert torch.equal(place[is_its], x_TH[is_its]) and (place[~is_its] == 7.0).all()
    rows_TOH = torch.randn(T, owners, H, device=DEVICE).bfloat16()
    rows_TOH[~is_owner_TO] = torch.nan
    found = peer_rows.sum_of_owners(rows_TOH, owners_T)
    wanted = torch.where(is_owner_TO[..., None], rows_TOH.float(), 0.0).sum(1)
    assert torch.allclose(found.float(), wanted, atol=0.05)
    assert torch.allclose(found, REFERENCE.sum_of_owners(rows_TOH, owners_T), atol=0.05, rtol=0.02)
    state[0] = peer.LATE
    peer_rows.put_tokens(x_TH + 1, owners_T, peer.table_of(into, DEVICE), state, beside=beside)
    assert all(torch.equal(p[m], x_TH[m]) for p, m in zip(into, is_owner_TO.T))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_wait_is_over_by_the_clock() -> None:
    """Neither before, as others may be slow, nor much later."""
    flags, state, end = (
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        peer.new_state(DEVICE),
        peer.new_end(DEVICE),
    )
    peer.wait(flags, 1, word(1), LATER, state, end, 0.4)
    assert int(state[0]) == peer.LATE
    assert 0.4e9 <= int(state[2]) < 0.5e9
