"""Fill-in-the-middle: how documents are rearranged, and with which sentinels."""

import hashlib
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sparseray.actors.training.manifest import read_manifest
from sparseray.actors.training.token_data import TokenDataset
from sparseray.jobs.data import main
from sparseray.jobs.tokens.infilling import FAMILIES, cut, find_sentinels, with_sentinels
from sparseray.jobs.tokens.prepare import prepare
from sparseray.jobs.tokens.tokenizer import load_tokenizer, train_bpe

LINES = ["def take(self):", "    return naïve + 東京", "        if x: 🦜", "class River(Stone):", ""]


def write_texts(folder: Path, documents: int = 200) -> Path:
    draw = random.Random(5)
    folder.mkdir()
    for index in range(documents):
        lines = [f"# {index}", *draw.choices(LINES, k=draw.randrange(1, 30))]
        (folder / f"{index:03d}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def rows_of(data: Path, split: str) -> dict[str, list[int]]:
    return {
        row["document"]: row["tokens"] for row in pq.read_table(data / f"{split}-00000.parquet").to_pylist()
    }


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_rearranged_documents_are_the_texts_again_and_validation_stays_as_it_is(
    rate: float, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path / "text")
    manifest = prepare(
        [str(texts)], tmp_path / "data", vocab_size=300, validation_fraction=0.2, fim_rate=rate
    )
    tokenizer = TokenDataset(tmp_path / "data").tokenizer()
    found = find_sentinels(tokenizer.get_vocab())
    assert found is not None and manifest.infilling is not None
    whole = rearranged = 0
    for split in ("train", "validation"):
        for name, ids in rows_of(tmp_path / "data", split).items():
            assert ids.count(manifest.eos_id) == 1 and ids[-1] == manifest.eos_id
            ids = ids[:-1]
            if found.are_in(ids):
                assert split == "train" and ids[0] == found.prefix
                hole, end = ids.index(found.suffix), ids.index(found.middle)
                ids = [*ids[1:hole], *ids[end + 1 :], *ids[hole + 1 : end]]
                rearranged += 1
            else:
                whole += split == "train"
            text = (texts / Path(name).name).read_text(encoding="utf-8")
            # Cut inside a character's tokens it would not be UTF-8 in pieces; put together it always is.
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert rearranged == manifest.infilling.documents
    assert whole == 0 if rate == 1.0 else 0.3 < rearranged / (rearranged + whole) < 0.7


def test_a_text_is_cut_alike_wherever_it_lies_and_between_any_two_characters(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    one, other = tmp_path / "one", tmp_path / "other"
    prepare([str(texts)], one, vocab_size=300, validation_fraction=0.2, fim_rate=0.5)
    half = tmp_path / "half"
    half.mkdir()
    for path in sorted(texts.iterdir())[::2]:
        path.rename(half / path.name)
    prepare([str(half), str(texts)], other, tokenizer=str(one), validation_fraction=0.2, fim_rate=0.5)
    first, second = (rows_of(data, "train") for data in (one, other))
    assert {Path(n).name: ids for n, ids in first.items()} == {Path(n).name: ids for n, ids in second.items()}
    text = "ab"
    cuts = {cut(text, hashlib.sha256(bytes([n])).digest(), 1.0) for n in range(200)}
    assert cuts == {(text[:i], text[i:j], text[j:]) for i in range(3) for j in range(i, 3)}


def test_sentinels_are_the_tokenizers_own_or_are_added_at_its_end(tmp_path: Path) -> None:
    deepseek = load_tokenizer("deepseek")
    found = find_sentinels(deepseek.tokenizer.get_vocab())
    assert found is not None and (found.prefix, found.suffix, found.middle) == (128801, 128800, 128802)
    size = deepseek.vocab_size
    assert with_sentinels(deepseek.tokenizer) == found and deepseek.vocab_size == size
    plain = train_bpe(["a plain text"] * 9, 270)
    size = plain.vocab_size
    added = with_sentinels(plain.tokenizer)
    assert (added.prefix, added.suffix, added.middle) == (size, size + 1, size + 2)
    assert plain.vocab_size == size + 3
    assert find_sentinels(dict.fromkeys(FAMILIES[2][:2], 7)) is None


def test_a_text_that_spells_a_sentinel_is_left_whole(tmp_path: Path) -> None:
    """DeepSeek's sentinels are no special tokens to the library: a text that has them becomes them."""
    folder = write_texts(tmp_path / "text", 30)
    (folder / "forged.py").write_text("a = '<｜fim▁hole｜>'\n" * 20, encoding="utf-8")
    prepare([str(folder)], tmp_path / "data", tokenizer="deepseek", validation_fraction=0.0, fim_rate=1.0)
    ids = rows_of(tmp_path / "data", "train")["text/forged.py"]
    assert ids.count(128800) == 20 and 128801 not in ids and 128802 not in ids


def test_long_files_are_cut_to_documents_of_the_length_that_is_asked_for(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    manifest = prepare([str(texts)], tmp_path / "data", vocab_size=300, document_bytes=200, fim_rate=0.5)
    tokenizer, sizes = TokenDataset(tmp_path / "data").tokenizer(), []
    for ids in rows_of(tmp_path / "data", "validation").values():
        sizes.append(len(tokenizer.decode(ids[:-1], skip_special_tokens=False).encode()))
    assert max(sizes) <= 200 and manifest.splits["train"].documents > 200


@pytest.mark.parametrize(
    ("option", "value", "cure"),
    [
        ("--fim_rate", "1.5", "try 0.5"),
        ("--fim_rate", "nan", "try 0.5"),
        ("--document_bytes", "9", "try 2048"),
    ],
)
def test_what_cannot_be_is_one_line_and_its_cure_works(
    option: str, value: str, cure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "text", 30)
    command = ["prepare", "--source", str(texts), "--vocab_size", "300", "--out", str(tmp_path / "data")]
    assert main([*command, option, value]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and cure in said and not (tmp_path / "data").exists()
    assert main([*command, option, cure.removeprefix("try ")]) == 0


def test_the_rate_is_a_half_where_none_is_given(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    words = ["prepare", "--source", str(texts), "--vocab_size", "300", "--validation_fraction", "0.1"]
    for name, more in (("asked", ["--fim_rate"]), ("given", ["--fim_rate", "0.5"]), ("none", [])):
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 0
    asked, given, none = (read_manifest(tmp_path / name).infilling for name in ("asked", "given", "none"))
    assert asked == given and asked is not None and asked.rate == 0.5 and none is None


def test_a_manifest_says_what_was_rearranged_and_old_ones_are_read(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", 40)
    prepare([str(texts)], tmp_path / "data", vocab_size=300, validation_fraction=0.1, fim_rate=0.5)
    path = tmp_path / "data" / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert raw["infilling"]["rate"] == 0.5 and raw["infilling"]["prefix_id"] == 1
    del raw["infilling"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert read_manifest(tmp_path / "data").infilling is None
