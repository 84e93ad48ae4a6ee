"""Several sources: kept apart in the shards, filtered and counted, and mixed by a pure function of the position."""

import json
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_cluster import tiny_run, train

from sparseray.actors.training.mixture import Mixture
from sparseray.actors.training.token_data import TokenBatches, TokenDataset
from sparseray.errors import ConfigError, DataError
from sparseray.jobs.data import main
from sparseray.jobs.tokens.languages import language_of
from sparseray.jobs.tokens.prepare import prepare
from sparseray.jobs.tokens.selection import code_complaint
from sparseray.platform.opening import open_training

CODE, PROSE = (
    ["def", "take(self):", "return", "shard", ";", "import", "numpy", ";", "x", "=", "[1,", "2]"],
    ["rain", "river", "stone", "bread", "light"],
)


def write(folder: Path, end: str, words: list[str], files: int = 30, seed: int = 1) -> Path:
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for index in range(files):
        lines = [" ".join(draw.choices(words, k=8)) for _ in range(20)]
        (folder / f"{index:02d}{end}").write_text(f"{index}\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    write(root / "code", ".py", CODE)
    write(root / "text", ".md", PROSE, files=45)
    sources = [f"code={root / 'code'}:0.75", f"text={root / 'text'}:0.25"]
    prepare(sources, root / "data", vocab_size=300, validation_fraction=0.2)
    return root / "data"


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any),
    st.integers(1, 7),
    st.integers(1, 30),
)
@settings(max_examples=150, deadline=None)
def test_every_source_has_its_share_in_order_without_gap_or_repetition(
    first: list[int], second: list[int], per_step: int, begin: int
) -> None:
    texts = [
        " ".join(f"s{i}={w}" for i, w in enumerate(first)),
        " ".join(f"s{i}={w}" for i, w in enumerate(second)) + f" from={begin}",
    ]
    mixture, seen = Mixture.parse(texts), Counter[str]()
    for step in range(2 * begin):
        counts: Counter[str] = Counter()
        for position in range(step * per_step, (step + 1) * per_step):
            name, index = mixture.place(position, per_step)
            assert index == seen[name]
            seen[name] += 1
            counts[name] += 1
        assert dict(counts) == mixture.counts(step, per_step)
        if step < begin:
            done = (step + 1) * per_step
            for i, weight in enumerate(first):
                assert abs(seen[f"s{i}"] - Fraction(done * weight, sum(first))) < len(first)


def test_a_mixture_is_read_exactly_and_what_cannot_be_read_is_said() -> None:
    mixture = Mixture.parse(["code=0.6 text=0.4", "text=1 code=0 from=500"])
    assert mixture.stages[0].weights == (("code", Fraction(3, 5)), ("text", Fraction(2, 5)))
    assert mixture.stages[1].begin == 500 and mixture.names == ("code", "text")
    wrong = ("", "code", "code=x", "code=-1", "code=0", "code=1 code=2", "code=1 from=1.5", "=1", "code=1/0")
    for text in wrong:
        with pytest.raises(ConfigError, match=r"write 'code=0\.6 text=0\.4'"):
            Mixture.parse([text])
    for texts in (["a=1 from=3"], ["a=1", "a=2"], ["a=1", "a=2 from=5", "a=1 from=4"]):
        with pytest.raises(ConfigError, match="begins at 0"):
            Mixture.parse(texts)


def test_batches_come_from_the_sources_and_the_unnamed_order_stays(mixed: Path) -> None:
    data = TokenDataset(mixed)
    assert set(data.sources) == {"code", "text"}
    (start, stop), (second, end) = data.sources["code"], data.sources["text"]
    assert start == 0 and stop == second and end == data.num_tokens
    assert [file.source for file in data.manifest.files if file.split == "train"] == ["code", "text"]
    tokenizer = data.tokenizer()
    mixture = Mixture.parse(["code=0.75 text=0.25", "text=1 from=3"])
    batches = TokenBatches(
        dataset=data, seed=3, num_parts=2, sequences_per_part=4, seq_len=16, mixture=mixture
    )
    for step, wanted in ((1, 2), (2, 2), (3, 8), (7, 8)):
        texts = [tokenizer.decode(row.tolist()) for part in (0, 1) for row in batches(step, part).tokens_BT]
        assert sum(any(word in text for word in PROSE) for text in texts) == wanted
    with pytest.raises(DataError, match="source 'code' of"):
        data.num_windows(10**6, "code")


@pytest.mark.long
def test_a_run_mixes_by_the_data_or_by_its_own_schedule_and_says_so_of_every_step(
    mixed: Path, tmp_path: Path
) -> None:
    config = tiny_run(mixed, steps=6)
    plain = train(tmp_path / "plain", config)
    assert [record["sources"] for record in plain.records] == [{"code": 192, "text": 64}] * 6
    scheduled = replace(config, data=replace(config.data, mixture=("code=0.75 text=0.25", "text=1 from=4")))
    one = train(tmp_path / "one", scheduled)
    assert one.records[2]["sources"] == plain.records[2]["sources"]
    assert [record["sources"] for record in one.records[3:]] == [{"text": 256}] * 3
    assert one.curve[:3] == plain.curve[:3] and one.curve[3] != plain.curve[3]
    many = replace(scheduled, cluster=replace(scheduled.cluster, attention_workers=2, expert_shards=2))
    train(tmp_path / "many", many, stop_after=4)
    two = train(tmp_path / "many", many)
    assert two.curve == one.curve and two.digest == one.digest


def test_a_source_that_the_data_has_not_is_refused_with_those_it_has(mixed: Path, corpus: Path) -> None:
    for data, says in ((mixed, "named sources code, text"), (corpus, "no named sources")):
        config = tiny_run(data)
        with pytest.raises(ConfigError, match=says):
            open_training(replace(config, data=replace(config.data, mixture=("maths=1",))))


def test_languages_are_counted_and_filters_say_what_each_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "src", ".py", CODE)
    write(folder / "docs", ".md", PROSE, files=5)
    bad = {
        "wide.py": "x = " + "aaaa " * 40 + "\n",
        "long.js": "\n".join(["var a = b;"] * 60) + "\n" + "y" * 1200 + "\n",
        "digits.c": "0123456789, 9876543210,\n" * 20,
        "page.xml": '<?xml version="1.0"?>\n<a>text</a>\n' * 5,
        "sheet.xslt": '<?xml version="1.0"?>\n<template>text</template>\n' * 5,
        "thin.html": "<div><span class='a'></span></div>\n" * 30 + "few words\n",
        "fat.html": "<p>" + "many words are shown here\n" * 30 + "</p>\n",
        "small.json": '{"alpha": "beta"}\n',
        "notes.md": "wide prose stays " * 60 + "\n",
    }
    for name, text in bad.items():
        (folder / name).write_text(text)
    command = ["prepare", "--source", str(folder), "--vocab_size", "300", "--out", str(tmp_path / "data")]
    assert main([*command, "--code_filters"]) == 0
    (source,) = TokenDataset(tmp_path / "data").manifest.sources
    assert source.skipped == {
        "XML": 1, "a very long line": 1, "data of another size": 1, "few letters": 1, "little visible text": 1,
        "long lines on average": 1,
    }  # fmt: skip
    assert source.languages == {"HTML": 1, "Markdown": 6, "Python": 30, "XSLT": 1}
    assert "1 XML" in capsys.readouterr().out


def test_a_filter_looks_at_code_alone_and_a_name_tells_the_language() -> None:
    wide = "word " * 300
    assert (
        code_complaint("a.py", wide)
        and not code_complaint("a.md", wide)
        and not code_complaint("LICENSE", wide)
    )
    assert (
        language_of("a/Makefile") == "Make"
        and language_of("a/b.PY#3") == "Python"
        and language_of("b") == "other"
    )


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        (["code={}", "{}"], "name each"),
        (["code={}:0.5", "text={}"], "weigh each or none"),
        (["code={}", "code={}"], "a name of its own"),
        (["co-de={}"], "write letters, as in code=DIR:0.6"),
        (["code={}:-1"], "write one above 0, as in code=DIR:0.6"),
        (["code={}:x"], "write one above 0"),
        (["from={}"], "is no name"),
    ],
)
def test_sources_that_cannot_be_are_refused(
    sources: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "text", ".py", CODE, files=3)
    given = [word for one in sources for word in ("--source", one.format(folder))]
    assert main(["prepare", *given, "--out", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said


def test_of_alike_documents_the_first_stays(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    folder = write(tmp_path / "src", ".py", [*CODE, *PROSE], files=25)
    text = (folder / "07.py").read_text()
    (folder / "07_copy.py").write_text(text.replace("rain", "hail", 2))
    (folder / "other.py").write_text("\n".join(reversed(text.splitlines())))
    manifests = [
        prepare([str(folder)], tmp_path / name, vocab_size=300, near_duplicates=0.7)
        for name in ("one", "two")
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0].sources[0].skipped == {"near duplicates": 1}
    assert manifests[0].sources[0].documents == 26


def test_without_the_library_duplicates_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(DataError, match=r"pip install 'sparseray\[dedup\]'"):
        prepare([str(tmp_path)], tmp_path / "out", near_duplicates=0.85)
    with pytest.raises(DataError, match=r"try 0\.85"):
        prepare([str(tmp_path)], tmp_path / "out", near_duplicates=0.3)


def test_a_manifest_before_sources_had_names_is_read(mixed: Path, tmp_path: Path) -> None:
    raw = json.loads((mixed / "manifest.json").read_text())
    for source in raw["sources"]:
        for name in ("languages", "name", "weight"):
            del source[name]
    for file in raw["files"]:
        del file["source"]
    folder = tmp_path / "old"
    folder.mkdir()
    for path in mixed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(raw))
    old = TokenDataset(folder)
    assert old.sources == {} and old.num_tokens == TokenDataset(mixed).num_tokens
