"""What a change of plan sends from where to where, and how many bytes that are."""

from collections import Counter
from dataclasses import replace

from test_plan import EXPERTS, LAYERS, change, fresh, size, spread, travelling

from sparseray.model.presets import preset
from sparseray.platform.planning.replan import holdings, moves, piece_bytes


def test_sources_send_about_the_same() -> None:
    plan = fresh(1, 4, 1)
    new = change(plan, dead=[2])
    sent: Counter[int] = Counter()
    for sources in travelling(plan, new).pulls.values():
        for source, pieces in sources.items():
            sent[source] += sum(map(size, pieces))
            assert all(source in holdings(plan)[piece] for piece in pieces)
    assert set(sent) == {1, 3, 4}
    assert spread(list(sent.values())) <= 3 * 1000
    assert sum(sent.values()) == travelling(plan, new).num_bytes(size)


def test_bytes_of_a_piece_are_those_of_weights_and_moments() -> None:
    config = preset("tiny")
    rows = [100, 205]
    of = piece_bytes(config, rows, 10)
    assert of(("dense", 0, 0)) == 120
    assert of(("expert", 0, 3)) == 3 * 4 * 3 * config.hidden * config.moe.expert_dim
    row = 2 * 4 * config.dse.head_dim + 4 + 8
    for layer, number in enumerate(rows):
        buckets = [of(("bucket", layer, bucket)) for bucket in range(config.dse.num_buckets)]
        assert sum(buckets) == number * row and spread(buckets) <= row


def test_bfloat16_moments_take_half_the_bytes_of_fp32_ones() -> None:
    exact, half = (piece_bytes(preset("tiny"), [100], 10, moments) for moments in ("float32", "bfloat16"))
    for piece in (("dense", 0, 0), ("expert", 0, 3)):
        assert half(piece) * 12 == exact(piece) * 8
    assert half(("bucket", 0, 0)) == exact(("bucket", 0, 0))


def test_bfloat16_rows_have_half_the_bytes_in_a_plan() -> None:
    exact = preset("tiny")
    half = replace(exact, dse=replace(exact.dse, row_dtype="bfloat16"))
    piece, rows = ("bucket", 0, 0), [exact.dse.num_buckets * 10]
    saved = piece_bytes(exact, rows, 1)(piece) - piece_bytes(half, rows, 1)(piece)
    assert saved == 10 * 2 * exact.dse.head_dim


def test_a_piece_is_pulled_from_whoever_has_sent_the_least() -> None:
    plan = fresh(1, 4, 1, replication=1)
    held = {piece: {1, 2, 3} for piece in holdings(plan) if piece[0] == "expert"}
    found = moves(held, plan, size)
    assert set(found.missing) == {piece for piece in holdings(plan) if piece[0] != "expert"}
    sent: Counter[int] = Counter()
    for sources in found.pulls.values():
        sent.update({source: len(pieces) for source, pieces in sources.items()})
    assert set(found.pulls) == {4} and set(sent.values()) == {LAYERS * EXPERTS // 4 // 3}
