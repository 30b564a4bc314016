"""Broken, missing and changed data: one clear error that names the file, or the right result."""

import gzip
import json
import lzma
from dataclasses import replace

import numpy as np
import pytest

from hydrajax.config import DataConfig
from hydrajax.data import make_pipeline
from hydrajax.data.__main__ import main
from hydrajax.data.sources import MAX_DOCUMENT, TextSource, open_documents
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError

pytestmark = pytest.mark.faults
TOKENIZER = load_tokenizer("bytes")


def refused(files, match, text_key="text"):
    with pytest.raises(UserError, match=match) as caught:
        documents = open_documents([str(f) for f in files], text_key, TOKENIZER)
        [documents[i] for i in range(len(documents))]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.txt", b"\x1e \n\x1e", r"a\.txt: no document"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: no document"),
        ("a.txt.xz", lzma.compress(b""), r"a\.txt\.xz: no document"),
        ("a.txt", b"good\x1ebad \xff\xfe", r"a\.txt: not UTF-8 at byte 9 of the file"),
        ("a.txt", b"cut \xe2\x82", r"not UTF-8 at byte 4"),
        ("a.txt.gz", gzip.compress(b"bad \xff"), r"not UTF-8 at byte 4 of the unpacked text"),
        ("a.txt.xz", lzma.compress(b"x" * 999)[:40], r"a\.txt\.xz: cannot be unpacked"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be unpacked"),
        ("a.jsonl", b'{"text": "x"}\n\n{"tex": "y", "b": 1}', r"line 3.*'text'.*\['b', 'tex'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', r"line 2.*expected a string"),
        ("a.jsonl", b'{"text": "x"}\n["y"]', r"line 2.*has list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"line 2: not valid JSON"),
        ("a.parquet", b"PAR1 no parquet PAR1", r"a\.parquet: not a readable parquet"),
        ("a.csv", b"x", r"a\.csv: unknown kind.*\.jsonl"),
        ("a.tokens", b"x", r"a\.tokens: not a \.tokens folder"),
    ],
)
def test_broken_files_are_named(tmp_path, name, data, match):
    if ".parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    refused([tmp_path / name], match)


def test_missing_files_and_globs(tmp_path):
    refused([tmp_path / "*.txt"], r"\*\.txt' matches no file")
    refused([tmp_path / "none.txt"], "none.txt' matches no file")
    refused([], "data.files is empty")


def test_parquet_columns_and_nulls(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x", None]}), tmp_path / "a.parquet")
    refused([tmp_path / "a.parquet"], r"no column 'text'.*\['body'\]")
    refused([tmp_path / "a.parquet"], "row 1: expected a string", text_key="body")


def test_array_record_that_is_none(tmp_path):
    pytest.importorskip("array_record.python.array_record_module")
    (tmp_path / "a.array_record").write_bytes(b"x" * 100)
    refused([tmp_path / "a.array_record"], r"a\.array_record: not a readable ArrayRecord")


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    refused([tmp_path / "a.parquet"], r"hydrajax\[parquet\]")


def test_document_longer_than_int32_bytes(tmp_path):
    path = tmp_path / "giant.txt"
    size = (1 << 31) + 12345
    with path.open("wb") as f:
        f.truncate(size)  # sparse: zeros that need no disk
        f.seek(size - 4)
        f.write(b"last")
    source = TextSource(path, "text")
    lengths = np.diff(source.spans)
    assert lengths.sum() == size and lengths.max() <= MAX_DOCUMENT
    assert source[len(source) - 1].content.endswith("last")


def test_one_giant_document_trains(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("no end in sight. " * 20_000)
    pipeline = make_pipeline(DataConfig(files=(str(path),), seq_len=128, rows=4), TOKENIZER)
    assert next(pipeline)["tokens"].shape == (4, 128)


def test_empty_rows_do_not_hang(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 3)
    with pytest.raises(UserError, match="are empty"):
        make_pipeline(DataConfig(files=(str(path),), seq_len=8, rows=1), TOKENIZER)


@pytest.mark.parametrize("data", [b"other\x1etext", b"alpha\x1ebetb", b"alpha\x1ebeta\x1emore"])
def test_resume_on_changed_data_is_refused(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(b"alpha\x1ebeta")
    cfg = DataConfig(files=(str(path),), seq_len=8, rows=1)
    state = json.loads(json.dumps(make_pipeline(cfg, TOKENIZER).get_state()))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"Cannot resume.*data\.files \(hash\)"):
        make_pipeline(cfg, TOKENIZER).set_state(state)


def test_resume_survives_a_move_of_the_folder(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"alpha\x1ebeta")
    cfg = DataConfig(files=(str(path),), seq_len=8, rows=1)
    state = make_pipeline(cfg, TOKENIZER).get_state()
    (tmp_path / "b").mkdir()
    moved = path.rename(tmp_path / "b" / "a.txt")
    make_pipeline(replace(cfg, files=(str(moved),)), TOKENIZER).set_state(state)


def test_a_bad_row_in_the_middle_of_training_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 500 + '{"oops": 1}\n')
    pipeline = make_pipeline(
        DataConfig(files=(str(path),), seq_len=16, rows=2, holdout=0.0), TOKENIZER
    )
    with pytest.raises(UserError, match="line 501"):
        for _ in range(100):
            next(pipeline)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "both are empty"),
        ({"synthetic": "recal"}, "'recal' is unknown"),
        ({"synthetic": "recall", "rows": 3}, "rows=3 cannot be divided"),
    ],
)
def test_settings_that_make_no_data(changes, match):
    with pytest.raises(UserError, match=match):
        make_pipeline(DataConfig(**changes), TOKENIZER, process_count=2)


def test_damaged_tokens_folder(tmp_path):
    (tmp_path / "a.txt").write_text("alpha\x1ebeta")
    out = tmp_path / "a.tokens"
    assert (
        main(["--files", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(out)]) == 0
    )
    data = (out / "tokens.npy").read_bytes()
    (out / "tokens.npy").write_bytes(data[:-4])
    refused([out], r"a\.tokens/tokens\.npy: cannot be read")
    (out / "tokens.npy").write_bytes(data)
    np.save(out / "keys.npy", np.zeros(1, np.uint32))
    refused([out], "damaged")
    (out / "keys.npy").unlink()
    refused([out], r"keys\.npy: cannot be read")


def test_failed_encoding_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"oops": 1}\n')
    assert (
        main(
            [
                "--files",
                str(tmp_path / "a.jsonl"),
                "--tokenizer",
                "bytes",
                "--out",
                str(tmp_path / "x.tokens"),
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
