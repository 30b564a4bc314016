"""Every kind of file gives the same documents; fingerprints, splits and .tokens folders."""

import gzip
import json
import lzma
import os
import pickle

import numpy as np
import pytest

from hydrajax.data import sources
from hydrajax.data.__main__ import main
from hydrajax.data.sources import find_files, fingerprint, open_documents
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError
from tests.bpe_folder import build_bpe

TEXTS = ["first document", "zweites — Dokument\nmit Zeilen", "第三", "x" * 500]
TOKENIZER = load_tokenizer("bytes")


def write(folder, kind):
    """Write TEXTS as a file of this kind."""
    path = folder / f"data{kind}"
    text = "\x1e".join(TEXTS).encode()
    rows = "\n".join(json.dumps({"text": t}) for t in TEXTS).encode()
    if kind in (".txt", ".jsonl"):
        path.write_bytes(text if kind == ".txt" else rows)
    elif kind in (".txt.xz", ".jsonl.gz"):
        path.write_bytes(lzma.compress(text) if kind == ".txt.xz" else gzip.compress(rows))
    elif kind == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3, 4]}), path, row_group_size=3)
    elif kind == ".array_record":
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for t in TEXTS:
            writer.write(t.encode())
        writer.close()
    else:
        main(["--files", str(write(folder, ".txt")), "--tokenizer", "bytes", "--out", str(path)])
    return path


def contents(documents):
    return [
        d if isinstance(d, str) else TOKENIZER.decode(d)
        for d in (documents[i].content for i in range(len(documents)))
    ]


KINDS = (".txt", ".txt.xz", ".jsonl", ".jsonl.gz", ".parquet", ".array_record", ".tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents_and_keys(tmp_path, kind):
    documents = open_documents([str(write(tmp_path, kind))], "text", TOKENIZER)
    plain = open_documents([str(write(tmp_path, ".txt"))], "text", TOKENIZER)
    assert contents(documents) == TEXTS
    assert [d.key for d in map(documents.__getitem__, range(4))] == [
        d.key for d in map(plain.__getitem__, range(4))
    ]
    assert contents(pickle.loads(pickle.dumps(documents))) == TEXTS


def test_files_follow_one_another(tmp_path):
    paths = [str(write(tmp_path, kind)) for kind in (".txt", ".jsonl", ".tokens")]
    assert contents(open_documents(paths, "text", TOKENIZER)) == TEXTS * 3


def test_sample_is_what_provenance_says():
    documents = open_documents(["sample"], "text", TOKENIZER)
    assert len(documents) == 44
    assert documents[0].content.startswith("Fellow-Citizens")
    assert documents[43].content.lstrip().startswith("Chapter 24")


def test_globs_are_sorted_and_without_repeats(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt"), str(tmp_path / "c*")])
    assert [p.name for p in found] == ["a.txt", "b.txt", "c.jsonl"]


def test_blank_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x1e\n\x1eone\x1e\x1e \x1etwo\n\x1e")
    (tmp_path / "b.jsonl").write_text('\n{"text": "three"}\n\n')
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert contents(open_documents(files, "text", TOKENIZER)) == ["one", "two\n", "three"]


def test_giant_document_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(sources, "_LINE_SEARCH", 100)
    text = "".join("é" * (i % 90) + "\n" for i in range(200)) + "本" * 2000 + "\x1eend"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    pieces = contents(open_documents([str(tmp_path / "a.txt")], "text", TOKENIZER))
    assert "".join(pieces[:-1]) == text[:-4] and pieces[-1] == "end"
    assert max(len(p.encode()) for p in pieces) <= 1000
    assert pieces[0].endswith("\n")


def test_utf8_check_survives_chunk_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SCAN", 7)
    (tmp_path / "a.txt").write_text("aé本😀" * 50, "utf-8")
    assert contents(open_documents([str(tmp_path / "a.txt")], "text", TOKENIZER)) == ["aé本😀" * 50]


def test_fingerprint_sees_every_change(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 5000)
    seen = {fingerprint([path])}
    for data in (b"a" * 4999 + b"b", b"b" + b"a" * 4999, b"a" * 2500 + b"b" + b"a" * 2499, b"a"):
        path.write_bytes(data)
        seen.add(fingerprint([path]))
    path.rename(tmp_path / "b.txt")
    seen.add(fingerprint([tmp_path / "b.txt"]))
    assert len(seen) == 6


def test_fingerprint_of_a_large_file_reads_little(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as f:
        f.truncate(1 << 33)
    before = fingerprint([path])
    with path.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert fingerprint([path]) != before


@pytest.mark.parametrize("vocab", ["bytes", "bpe"])
def test_tokens_folder_holds_what_encode_gives(tmp_path, vocab, capsys):
    name = "bytes" if vocab == "bytes" else str(build_bpe(tmp_path / "bpe"))
    tokenizer, out = load_tokenizer(name), tmp_path / "x.tokens"
    text = str(write(tmp_path, ".txt"))
    assert main(["--files", text, "--tokenizer", name, "--out", str(out)]) == 0
    assert "4 documents" in capsys.readouterr().out
    documents = open_documents([str(out)], "text", tokenizer)
    assert [list(documents[i].content) for i in range(4)] == tokenizer.encode_batch(TEXTS)
    assert np.load(out / "tokens.npy").dtype == np.uint16
    assert {p.name for p in tmp_path.iterdir()} <= {"bpe", "data.txt", "x.tokens"}
    assert main(["--files", text, "--tokenizer", name, "--out", str(out)]) == 2
    assert "not exist yet" in capsys.readouterr().err


def test_tokens_folder_of_another_tokenizer_is_refused(tmp_path):
    folder = write(tmp_path, ".tokens")
    with pytest.raises(UserError, match="another tokenizer"):
        open_documents([str(folder)], "text", load_tokenizer(build_bpe(tmp_path / "bpe")))
