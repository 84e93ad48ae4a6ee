"""Token shards: what `data prepare` writes, what it refuses, and which shards are refused when opened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sparseray.actors.training.token_data import TokenDataset
from sparseray.errors import DataError
from sparseray.jobs.data import main
from sparseray.jobs.tokens.prepare import prepare
from sparseray.jobs.tokens.tokenizer import load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
ODD_TEXT = "tab\t  four    spaces\r\n\u2028 naïve 東京 🦜 \x01 <|endoftext|> <｜end▁of▁sentence｜> end  \n\n"


def write_corpus(folder: Path, files: int = 60, lines: int = 40) -> Path:
    rng = random.Random(7)
    words = ["def", "return", "token", "shard", "expert", "(x)", "  ", "\n", "é", "memory"]
    for index in range(files):
        path = folder / f"part{index % 3}" / f"file_{index:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(" ".join(rng.choices(words, k=12)) + "\n" for _ in range(lines))
        path.write_text(f"# {index}\n{text}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparseray.jobs.tokens.encode.BATCH_BYTES", 9000)
        prepare([str(corpus)], out, vocab_size=300, validation_fraction=0.2, shard_tokens=8000)
    return out


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_documents_of_both_splits_decode_to_the_files_they_came_from(corpus: Path, prepared: Path) -> None:
    found: dict[str, str] = {}
    for split in ("train", "validation"):
        dataset = TokenDataset(prepared, split)
        tokenizer = dataset.tokenizer()
        for path in sorted(prepared.glob(f"{split}-*.parquet")):
            for row in pq.read_table(path).to_pylist():
                assert row["tokens"][-1] == dataset.eos_id
                assert dataset.eos_id not in row["tokens"][:-1]
                assert row["document"] not in found
                found[row["document"]] = tokenizer.decode(row["tokens"][:-1], skip_special_tokens=False)
    texts = {
        f"{corpus.name}/{path.relative_to(corpus)}": path.read_text(encoding="utf-8")
        for path in corpus.rglob("*.txt")
    }
    assert found == texts


def test_manifest_counts_are_those_of_the_shards_and_the_text(corpus: Path, prepared: Path) -> None:
    manifest = TokenDataset(prepared).manifest
    assert sum(split.bytes for split in manifest.splits.values()) == sum(
        path.stat().st_size for path in corpus.rglob("*.txt")
    )
    assert len([file for file in manifest.files if file.split == "train"]) > 1
    for split in ("train", "validation"):
        dataset = TokenDataset(prepared, split)
        counts = manifest.splits[split]
        tables = [pq.read_table(path) for path in sorted(prepared.glob(f"{split}-*.parquet"))]
        assert dataset.num_documents == counts.documents == sum(table.num_rows for table in tables) > 1
        flat = np.concatenate(
            [table.column("tokens").combine_chunks().flatten().to_numpy() for table in tables]
        )
        np.testing.assert_array_equal(dataset.tokens, flat)
        assert dataset.num_tokens == counts.tokens == len(flat)
        assert dataset.num_bytes == counts.bytes
        assert dataset.bytes_per_token == pytest.approx(counts.bytes / counts.tokens)
        assert dataset.tokens.dtype == np.uint16
        assert dataset.vocab_size == dataset.tokenizer().get_vocab_size()


def test_same_input_gives_the_same_bytes_whatever_the_number_of_threads(
    corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from sparseray.jobs.tokens import prepare as work\n"
        "from sparseray.jobs.tokens import encode; encode.BATCH_BYTES = 9000\n"
        "out = Path(sys.argv[2])\n"
        "work.prepare([sys.argv[1]], out, vocab_size=300, validation_fraction=0.2, shard_tokens=8000)"
    )
    done = python(code, str(corpus), str(tmp_path / "again"), RAYON_NUM_THREADS="1", PYTHONHASHSEED="5")
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_equal_texts_never_straddle_the_split(tmp_path: Path) -> None:
    folder = tmp_path / "twins"
    for copy in ("a", "b"):
        write_corpus(folder / copy)
    prepare([str(folder)], tmp_path / "out", vocab_size=280, validation_fraction=0.3)
    sides = {}
    for split in ("train", "validation"):
        rows = pq.read_table(tmp_path / "out" / f"{split}-00000.parquet", columns=["tokens"]).to_pylist()
        sides[split] = {tuple(row["tokens"]) for row in rows}
        assert len(rows) == 2 * len(sides[split])
    assert not sides["train"] & sides["validation"]


@pytest.mark.parametrize("kind", ["bpe", "deepseek"])
def test_tokenizers_round_trip_any_text_and_forge_no_boundary(kind: str) -> None:
    tokenizer = (
        load_tokenizer("deepseek") if kind == "deepseek" else train_bpe(["def f(x): return x\n"] * 9, 270)
    )
    rng = random.Random(3)
    noise = "".join(map(chr, rng.choices([*range(1, 0xD800), *range(0xE000, 0x11000)], k=4000)))
    texts = [ODD_TEXT, noise, " " * 33 + "x", "\n" * 9]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
    assert tokenizer.tokenizer.id_to_token(tokenizer.eos_id) == tokenizer.eos_token


def test_deepseek_vocabulary_is_stored_as_uint32_and_reused_from_a_path(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(
        [str(corpus / "part0")], tmp_path / "deep", tokenizer="deepseek", validation_fraction=0
    )
    assert (manifest.token_dtype, manifest.vocab_size, manifest.eos_id) == ("uint32", 129280, 1)
    again = prepare(
        [str(corpus / "part0")], tmp_path / "b", tokenizer=str(tmp_path / "deep"), validation_fraction=0
    )
    assert again.files == manifest.files
    assert TokenDataset(tmp_path / "deep").tokens.dtype == np.uint32


def test_several_sources_are_read_once_each_and_recorded(corpus: Path, tmp_path: Path) -> None:
    single = tmp_path / "notes.txt"
    single.write_text("one more document\n")
    (corpus / "part1" / "LICENSE").write_text("MIT\n")
    specs = [str(single), str(corpus / "part1"), str(corpus)]
    try:
        manifest = prepare(specs, tmp_path / "out", vocab_size=280)
    finally:
        (corpus / "part1" / "LICENSE").unlink()
    assert [source.documents for source in manifest.sources] == [1, 21, 40]
    assert [source.licence for source in manifest.sources] == ["not stated", "see LICENSE", "not stated"]
    assert sum(split.documents for split in manifest.splits.values()) == 62


def test_undecodable_binary_empty_and_hidden_files_are_left_out_and_counted(
    corpus: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(corpus / "part2", tmp_path / "mixed"))
    (folder / "latin.txt").write_bytes(b"caf\xe9 is not UTF-8\n")
    (folder / "image.bin").write_bytes(b"a\0b")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_text("secret")
    os.mkfifo(folder / "pipe")
    manifest = prepare([str(folder)], tmp_path / "out", vocab_size=280)
    assert manifest.sources[0].skipped == {"empty": 1, "undecodable": 2}
    assert manifest.sources[0].documents == 20


def test_one_long_file_is_cut_at_line_ends_and_can_be_validated_on(tmp_path: Path) -> None:
    text = "".join(f"line {index} of the only file, é\n" for index in range(4000)) + "東" * 9000
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    prepare([str(tmp_path / "long.txt")], tmp_path / "out", vocab_size=280)
    rows = [row for path in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    rows.sort(key=lambda row: int(row["document"].partition("#")[2] or 1))
    tokenizer = TokenDataset(tmp_path / "out", "validation").tokenizer()
    pieces = [tokenizer.decode(row["tokens"][:-1], skip_special_tokens=False) for row in rows]
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:40])


def test_output_folder_inside_the_source_is_not_read(corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "project"))
    first = prepare([str(folder)], folder / "data", vocab_size=280)
    again = prepare([str(folder)], folder / "data", vocab_size=280, overwrite=True)
    assert first == again
    assert sorted(path.name for path in folder.iterdir()) == ["data", "part0", "part1", "part2"]


KILL = """
import os, signal, sys
from pathlib import Path
from sparseray.jobs.tokens import prepare as work
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] in ("write_manifest", "_commit"): setattr(work, sys.argv[3], die)
progress = lambda phase, done, total: die() if phase == sys.argv[3] else None
from sparseray.jobs.tokens import encode
encode.BATCH_BYTES = 4000
work.prepare([sys.argv[1]], Path(sys.argv[2]), vocab_size=280, shard_tokens=3000, progress=progress)
"""


@pytest.mark.parametrize("moment", ["training the tokenizer", "tokenising", "write_manifest", "_commit"])
def test_killed_preparation_leaves_nothing_that_looks_finished(
    corpus: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    done = python(KILL, str(corpus), str(out), moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(DataError, match="does not exist"):
        TokenDataset(out)
    prepare([str(corpus)], out, vocab_size=280)
    assert TokenDataset(out, "validation").num_tokens > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_while_writing_removes_the_work_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparseray.jobs.tokens.prepare.write_manifest", full)
    assert (
        main(["prepare", "--source", str(corpus), "--out", str(tmp_path / "out"), "--vocab_size", "280"]) == 2
    )
    assert list(tmp_path.iterdir()) == []


def test_a_second_preparation_of_the_same_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    def second(phase: str, done_bytes: int, total_bytes: int) -> None:
        if phase == "tokenising":
            with pytest.raises(DataError, match="another preparation"):
                prepare([str(corpus)], tmp_path / "out", vocab_size=280)
            seen.append(phase)

    seen: list[str] = []
    prepare([str(corpus)], tmp_path / "out", vocab_size=280, progress=second)
    assert seen
    assert TokenDataset(tmp_path / "out").num_tokens > 0


def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "in" / "empty"
    empty.mkdir(parents=True)
    (tmp_path / "in" / "bytes").mkdir()
    (tmp_path / "in" / "bytes" / "x.bin").write_bytes(b"\xff\xfe\0")
    (tmp_path / "in" / "short.txt").write_text("hello")
    (tmp_path / "in" / "not.json").write_text("{}")
    good = str(corpus)
    cases = [
        (["--source", str(tmp_path / "absent")], "does not exist"),
        (["--source", str(empty)], "holds no file"),
        (["--source", str(tmp_path / "in" / "bytes")], "1 undecodable"),
        (["--source", str(tmp_path / "in" / "short.txt")], "too few to split"),
        (["--source", good, "--source", good], "not in an earlier source"),
        (["--source", good, "--tokenizer", "gpt17"], "unknown tokenizer 'gpt17'"),
        (["--source", good, "--tokenizer", str(tmp_path / "in" / "not.json")], "is not a tokenizer.json"),
        (["--source", good, "--vocab_size", "100"], "vocab_size=100"),
        (["--source", good, "--validation_fraction", "1.5"], "validation_fraction=1.5"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        assert main(["prepare", *arguments, "--out", str(tmp_path / "deep" / "out")]) == 2
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("sparseray: error: ")
        ]
        assert len(lines) == 1
        assert message in lines[0]
        assert sorted(tmp_path.rglob("*")) == before


def test_finished_data_and_foreign_folders_are_not_overwritten_silently(
    corpus: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--source", str(corpus), "--vocab_size", "290", "--out"]
    before = (copied / "manifest.json").read_bytes()
    assert main([*arguments, str(copied)]) == 2
    assert "already holds a finished data set" in capsys.readouterr().err
    assert (copied / "manifest.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert main([*arguments, str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert main([*arguments, str(copied), "--overwrite"]) == 0
    assert TokenDataset(copied).vocab_size == 290
    assert str(copied) in capsys.readouterr().out


def test_tampered_and_missing_files_are_refused(copied: Path) -> None:
    shard = copied / "train-00000.parquet"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-00000.parquet was changed: SHA-256"):
        TokenDataset(copied)
    assert TokenDataset(copied, "validation").num_tokens > 0
    shard.unlink()
    for verify in (True, False):
        with pytest.raises(DataError, match="is missing"):
            TokenDataset(copied, verify=verify)
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json was changed"):
        TokenDataset(copied, "validation")


def test_unverified_opening_still_refuses_truncated_and_swapped_shards(copied: Path) -> None:
    shutil.copy(copied / "validation-00000.parquet", copied / "train-00000.parquet")
    with pytest.raises(DataError, match="not what the manifest says"):
        TokenDataset(copied, verify=False)
    (copied / "train-00000.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="cannot be read"):
        TokenDataset(copied, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this release reads 1"),
        ({"format": "other"}, "not a manifest of token shards"),
        ({"splits": {}}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"token_dtype": "float64"}, "damaged"),
    ],
)
def test_manifest_of_another_version_or_shape_is_refused(
    copied: Path, change: dict[str, object], message: str
) -> None:
    path = copied / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        TokenDataset(copied)


def test_manifest_may_not_name_files_outside_its_folder(copied: Path) -> None:
    path = copied / "manifest.json"
    raw = json.loads(path.read_text())
    raw["files"][0]["name"] = "../elsewhere.parquet"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="names a shard"):
        TokenDataset(copied)


def test_standard_library_is_found_without_installed_packages() -> None:
    from sparseray.jobs.tokens.corpus import find_sources

    (source,) = find_sources(["stdlib"])
    names = [file.name for file in source.files]
    assert {"stdlib/json/__init__.py", "stdlib/os.py"} <= set(names)
    assert names == sorted(names)
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert (source.licence, source.version) == ("PSF-2.0", f"Python {sys.version.split()[0]}")


def test_a_tokenizer_over_which_the_library_panics_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Found by tests/fuzz.py: a prefix longer than a merged token makes the Rust library panic."""
    found = json.loads(train_bpe(["def f(x): return x\n"] * 9, 270).tokenizer.to_str())
    found["model"]["continuing_subword_prefix"] = "a longer prefix than any token has"
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer.json of .*; restore it"):
        load_tokenizer(str(tmp_path))
