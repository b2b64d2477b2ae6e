"""The demo model's text: three public-domain sources from Debian packages, cleaned and split."""

import html
import re
import struct
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("bible-kjv-text", "bible-kjv", "sword-text-web", "r-cran-janeaustenr")
SOURCES = (
    (
        "King James Version of the Bible (1611)",
        "bible-kjv-text, printed by bible-kjv",
        "public domain (the copyright of the text is expired); the data file may be used, copied, "
        "modified and distributed freely",
    ),
    (
        "World English Bible with Deuterocanon (2020 stable text)",
        "sword-text-web",
        "public domain (the name is a trademark of eBible.org)",
    ),
    (
        "Jane Austen's six novels (1811-1818), Project Gutenberg transcriptions",
        "r-cran-janeaustenr",
        "public domain text; the package around it (not used here) is MIT, (c) Julia Silge",
    ),
)
HELD_OUT_PERIOD, HELD_OUT_CHAPTER = 33, 17  # chapters 17, 50, 83, ... of every book
_HEADING = re.compile(r"\s*(chapter|volume)\s+([ivxlc]+|\d+)\s*$|\s*(finis|the end)\s*$", re.I)


Chapter = tuple[int, str]  # its number in its book, its text


@dataclass(frozen=True)
class Corpus:
    """Chapters of plain text, one paragraph per line; `train` is in reading order."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(files: list[Path]) -> Corpus:
    """Read `files` (plain text, blank lines between chapters), or fetch the Debian packages.

    Raises CalledProcessError when apt-get or dpkg-deb fails.
    """
    if files:
        texts = [re.split(r"\n\s*\n\s*\n+", file.read_text("utf-8")) for file in files]
        chapters = [chapter for text in texts for chapter in enumerate(map(_reflow, text), 1)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            root = _unpack_packages(Path(folder))
            chapters = _king_james(root) + _world_english(root) + _austen(root)
    parts: tuple[list[str], list[str]] = [], []
    for number, text in chapters:
        if len(text) > 200:  # title pages are shorter
            parts[number % HELD_OUT_PERIOD == HELD_OUT_CHAPTER].append(text)
    return Corpus(tuple(parts[0]), tuple(parts[1]))


def _unpack_packages(folder: Path) -> Path:
    subprocess.run(
        ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *PACKAGES],
        cwd=folder,
        check=True,
    )
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "root")], check=True)
    return folder / "root"


def _reflow(text: str) -> str:
    """One paragraph per line, without Gutenberg's _italics_ and double blanks."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "".join(p.replace("_", "") + "\n" for p in paragraphs if p)


def _king_james(root: Path) -> list[Chapter]:
    """Each chapter's verses run together without their numbers."""
    printed = subprocess.run(
        [root / "usr/bin/bible", "-l9999", "-p", root / "usr/lib", "gen1:1-rev22:21"],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    ).stdout.decode("ascii")
    chapters: list[tuple[int, list[str]]] = []
    for line in printed.splitlines():
        verse = re.match(r"\s+\d+ (.*)", line)
        if verse:
            chapters[-1][1].append(verse[1])
        elif line.strip():  # "Genesis 1"
            chapters.append((int(line.split()[-1]), []))
    return [(number, _reflow(" ".join(verses))) for number, verses in chapters]


def _world_english(root: Path) -> list[Chapter]:
    """The chapters of a SWORD zText module: one zlib stream of OSIS markup per book."""
    folder = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    chapters: list[Chapter] = []
    for part in ("ot", "nt"):
        data = (folder / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", (folder / f"{part}.bzs").read_bytes()):
            book = zlib.decompress(data[start : start + size]).decode("utf-8")
            pieces = re.split(r'<chapter n="(\d+)"[^>]*sID[^>]*>', book)
            for number, osis in zip(pieces[1::2], pieces[2::2], strict=True):
                chapters.append((int(number), _reflow(_plain(osis.split("<chapter")[0]))))
    return chapters


def _plain(osis: str) -> str:
    """OSIS without notes, titles and tags, with straight quotes; paragraphs stay apart."""
    text = re.sub(r"(?s)<(note|title)\b.*?</\1>", "\0", osis)
    text = re.sub(r'<div [^>]*sID[^>]*type="x-p"[^>]*>', "\n\n", text)
    text = re.sub(r"<(l|lg|lb|div)\b[^>]*>", " ", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub("\0+(?=\\w)", " ", text).replace("\0", "")  # a note may stand for the blank
    return text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: "--"})


def _austen(root: Path) -> list[Chapter]:
    """The novels from R's lazy-load database, which holds one character vector for each."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    chapters: list[Chapter] = []
    position = 0
    while position < len(data):
        unpacker = zlib.decompressobj()  # each object: big-endian length, then a zlib stream
        vector = unpacker.decompress(data[position + 4 :])
        position = len(data) - len(unpacker.unused_data)
        novel: list[list[str]] = [[]]
        for line in _r_strings(vector):
            if _HEADING.match(line):
                novel.append([])
            else:
                novel[-1].append(line)
        texts = [text for text in map(_reflow, map("\n".join, novel)) if len(text) > 200]
        chapters += enumerate(texts, 1)
    return chapters


def _r_strings(data: bytes) -> list[str]:
    """The strings of one serialized R character vector (XDR, serialization version 3)."""
    offset = 2 + 3 * 4  # "X\n", then three version numbers
    offset += 4 + struct.unpack_from(">I", data, offset)[0]  # the native encoding's name
    _, count = struct.unpack_from(">II", data, offset)
    offset += 8
    strings: list[str] = []
    for _ in range(count):
        _, size = struct.unpack_from(">Ii", data, offset)  # flags, length
        offset += 8
        strings.append(data[offset : offset + size].decode("utf-8"))
        offset += size
    return strings
