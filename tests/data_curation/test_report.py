"""The report: its numbers are the index's, a leak is found and told, texts stay text, half a corpus is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation.accounts import HELD_OUT
from data_curation.box import Box
from data_curation.index import SCHEMA, CorpusError, fingerprint
from data_curation.phantom import make
from data_curation.report import Settings, main
from data_curation.report_facts import Facts
from data_curation.report_facts import gather as gather_facts
from data_curation.report_page import page
from data_curation.report_pictures import TILE, contact_sheet
from data_curation.slices import Slice, content, encode, sha256

PATIENTS = [("chaos", "a", "train"), ("chaos", "b", "val"), ("msd_spleen", "c", "train"), ("<b>odd</b>", "d", "train")]
LICENCES = {"chaos": "CC BY-NC-SA 4.0", "msd_spleen": "CC BY-SA 4.0", "<b>odd</b>": "my own"}
SETS = {
    "chaos": {"catalogue": "chaos"}, "msd_spleen": {"catalogue": "msd_spleen"},
    "<b>odd</b>": {"catalogue": "totalsegmentator"}, "nothing": {"catalogue": "folder"},
}  # fmt: skip


def corpus(folder: Path, **changes: object) -> Path:
    """A corpus as `axial curate` leaves it, one volume of four slices a patient; `changes` overwrite columns."""
    (folder / "shards").mkdir(parents=True)
    rows, blob = [], b""
    for number, (dataset, patient, split) in enumerate(PATIENTS):
        phantom = make(number, (4, 40, 48), (30.0, 9.0, 7.5))
        for z, whole in enumerate(phantom.hu):
            box = Box(4, 8, 30, 36)
            hu = np.ascontiguousarray(box.of(whole))
            stored = encode(hu)
            one = Slice(z, hu, box, (40, 48), float((whole > -500).mean()), -700, 0.0)
            rows.append(
                {
                    "key": f"{patient * 8}_{z:05d}", "dataset": dataset, "volume": patient * 8, "patient": patient,
                    "study": patient, "z": z, "position_mm": 30.0 * z, "n_slices": 4, "height": 30, "width": 36,
                    "frame_height": 40, "frame_width": 48, "box_y": 4, "box_x": 8, "box": "parts of the patient",
                    "outside_max": -700, "outside_body": 0.0,
                    "spacing_z": 30.0 - number, "spacing_y": 9.0, "spacing_x": 7.5, **one.statistics(),
                    "body_fraction": one.body_fraction, "rounding": 0.0, "notes": "", "sha256": sha256(hu),
                    "content": content(hu), "licence": LICENCES[dataset], "commercial": dataset == "msd_spleen",
                    "held_out": "", "split": split, "excluded": "",
                    "duplicate_group": patient * 8, "duplicate": False, "codec": "j2c", "shard": "000.tar",
                    "offset": len(blob), "size": len(stored), "crc32": zlib.crc32(stored), **changes,
                }
            )  # fmt: skip
            blob += stored
    (folder / "shards" / "000.tar").write_bytes(blob)
    return save(folder, rows)


def save(folder: Path, rows: list[dict[str, object]]) -> Path:
    index = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(index, folder / "index.parquet", row_group_size=5)
    (folder / "corpus.json").write_text(json.dumps({"fingerprint": fingerprint([index]), "datasets": SETS}))
    refused = [("chaos", f"{i:016x}", "truncated") for i in range(5)]
    refused += [("nothing", "", "<script>"), ("chaos", "e" * 16, "held_out"), ("chaos", "f" * 16, "held_out_related")]
    left_out = [("chaos", "a" * 8, 9, "air"), ("chaos", "a" * 8, 8, "between"), ("msd_spleen", "c" * 8, 7, "air")]
    for name, columns, lines in (
        ("refused", ("dataset", "volume", "reason"), refused),
        ("left_out", ("dataset", "volume", "z", "reason"), left_out),
    ):
        values = zip(*lines, strict=True)  # type: ignore[call-overload]
        pq.write_table(pa.table(dict(zip(columns, values, strict=True))), folder / f"{name}.parquet")
    pq.write_table(HELD_OUT.empty_table(), folder / "held_out.parquet")
    return folder


def gather(folder: Path, tiles: int = 3, sample: int = 4) -> Facts:
    return gather_facts(folder, tiles, sample)


class Checked(HTMLParser):
    """Balanced tags, no script, and the pictures inside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.pictures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset"):
                self.pictures.append(value or "")
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_sound_file_with_the_numbers(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}
    outcome = main(Settings(folder=folder))
    assert outcome.ok
    assert [Path(made).name for made in outcome.made] == ["report.html", "report.png"]
    assert all(hashlib.sha256(path.read_bytes()).digest() == digest for path, digest in before.items())
    assert {path.name for path in folder.rglob("*") if path.is_file() and path not in before} == {
        "report.html",
        "report.png",
    }
    text = (folder / "report.html").read_text()
    parsed = Checked()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    assert not parsed.seen & {"script", "link", "iframe", "b>odd"}
    assert all(picture.startswith("data:image/png;base64,") for picture in parsed.pictures)
    assert len(parsed.pictures) == 2 + 3  # charts for light and dark, a sheet a data set
    for picture in parsed.pictures:
        assert imagecodecs.png_decode(base64.b64decode(picture.partition(",")[2])).ndim >= 2
    assert not re.search(r"https?://[^<]*\.(js|css)|<script", text)
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;odd&lt;/b&gt;" in text
    assert "<b>odd" not in text
    assert "private/refused.csv" in text
    assert "Kavur A. E." in text
    assert "Wasserthal J." in text  # under the name that corpus.json gives it in the catalogue
    assert "Nothing was kept of nothing." in text
    assert "prefers-color-scheme: dark" in text
    assert str(tmp_path) not in text
    assert "axial curate read" not in text  # nobody wrote down how fast it was
    shape = imagecodecs.png_decode((folder / "report.png").read_bytes()).shape
    assert min(shape[:2]) > 600


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the first table under a title, by the first cell of each row."""
    table = re.search(rf"<h2>{title}</h2>.*?<table>(.*?)</table>", text, re.DOTALL)
    assert table is not None
    lines = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table[1])]
    return {
        re.sub("<[^>]*>", "", line[0]): [re.sub("<[^>]*>", "", cell).strip() for cell in line[1:]] for line in lines
    }


def test_the_tables_say_what_was_dropped_and_what_is_allowed(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    (folder / "private").mkdir()
    (folder / "private" / "throughput.json").write_text('{"slices_read": 900, "seconds": 3, "workers": 2}')
    text = page(gather(folder))
    scans = rows_of(text, "Refused scans, by reason")
    assert scans["truncated"] == ["5", "5", "0"]
    assert scans["held_out"] == ["1", "1", "0"]
    slices = rows_of(text, "Slices left out of kept scans, by reason")
    assert (slices["air"], slices["between"]) == (["2", "1", "1"], ["1", "1", "0"])
    assert rows_of(text, "Kept out of training")["chaos"] == ["1", "1", "0", ""]
    rights = rows_of(text, "Licences and citations")
    assert rights["chaos"][:3] == ["CC BY-NC-SA 4.0", "no", "yes"]
    assert rights["msd_spleen"][:3] == ["CC BY-SA 4.0", "yes", "yes"]
    assert rights["&lt;b&gt;odd&lt;/b&gt;"][:3] == ["my own", "unknown", "unknown"]  # not the licence of the catalogue
    assert "may not, as a whole, be used commercially" in text
    assert "read 900 slices in 3s: 300 slices/s with 2 workers" in text


def test_duplicates_are_counted_between_data_sets(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    for row in rows:
        row["split"] = "train"
        if row["volume"][0] in "bc":
            row["duplicate_group"] = "a" * 8
    found = gather(save(folder, rows)).duplicates
    assert (found.groups, found.volumes, found.across) == (1, 3, 1)
    assert found.names == ("chaos", "msd_spleen", "<b>odd</b>")
    assert found.shared.tolist() == [[2, 2, 0], [1, 0, 0], [0, 0, 0]]
    assert rows_of(page(gather(folder)), "Duplicates")["msd_spleen"] == ["1", "0"]


def test_withdrawn_slices_are_told_and_not_shown(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    why = "tied to a case that is held out for testing"
    for row in rows:
        if row["volume"][0] in "bd":
            row.update(split="excluded", excluded=why)
    facts = gather(save(folder, rows))
    assert facts.sets[0].excluded == {why: 4}
    assert facts.wrong == ()
    assert {tile.key[0] for tile in facts.tiles["chaos"]} == {"a"}
    assert facts.tiles["<b>odd</b>"] == ()
    outcome = main(Settings(folder=folder))
    assert outcome.ok
    assert rows_of((folder / "report.html").read_text(), "Kept out of training")["chaos"][3] == f"4 slices {why}"
    for row in rows:
        row["patient"] = "same" if row["volume"][0] in "ab" else row["patient"]
    assert "patients are both withdrawn" in gather(save(folder, rows)).wrong[0]


def test_equal_corpora_give_equal_bytes_without_a_path(tmp_path: Path) -> None:
    made = []
    for name in ("Jane_Doe", "other"):
        folder = corpus(tmp_path / name)
        main(Settings(folder=folder))
        made.append([(folder / file).read_bytes() for file in ("report.html", "report.png")])
    assert made[0] == made[1]
    kinds = {made[0][1][at + 4 : at + 8] for at in _chunks(made[0][1])}
    assert kinds <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text, no time


def _chunks(png: bytes) -> Iterator[int]:
    """Where the chunks of a PNG begin."""
    at = 8
    while at < len(png):
        yield at
        at += 12 + int.from_bytes(png[at : at + 4], "big")


def test_facts_are_those_of_the_index(tmp_path: Path) -> None:
    facts = gather(corpus(tmp_path / "corpus"))
    chaos = next(s for s in facts.sets if s.name == "chaos")
    assert (chaos.patients, chaos.volumes, chaos.slices, chaos.duplicates, chaos.test_cases) == (2, 2, 8, 0, 0)
    assert facts.volumes.of("chaos").between.tolist() == [30.0, 29.0]
    assert facts.volumes.of("chaos").within.tolist() == [7.5, 7.5]
    assert facts.volumes.of("chaos").slices.tolist() == [4, 4]
    assert chaos.stored == 30 * 36 / (40 * 48)
    index = pq.read_table(tmp_path / "corpus" / "index.parquet")
    assert sum(s.size for s in facts.sets) == sum(index["size"].to_pylist())
    assert [(s.name, s.slices, s.volumes, s.patients, s.groups) for s in facts.splits] == [
        ("train", 12, 3, 3, 3),
        ("val", 4, 1, 1, 1),
    ]
    assert [(proof.left, proof.right, proof.shared) for proof in facts.proofs] == [
        *[(3, 1, 0)] * 2, *[(12, 4, 0)] * 2, (0, 4, 0), (0, 16, 0), *[(1, 4, 0)] * 2, (5, 4, 0), (0, 4, 0)
    ]  # fmt: skip
    assert chaos.refused == {"truncated": 5, "held_out": 1, "held_out_related": 1}
    assert [s.name for s in facts.sets if not s.slices] == ["nothing"]
    assert sum(counts.sum() for counts in facts.sizes.values()) == 16
    assert all(shares.sum() == pytest.approx(1) for shares in facts.hu.values())
    assert len(facts.tiles["msd_spleen"]) == 3
    wanted = make(2, (4, 40, 48), (30.0, 9.0, 7.5)).hu[:, 4:34, 8:44]
    assert any(np.array_equal(facts.tiles["msd_spleen"][1].hu, plane) for plane in wanted)


@pytest.mark.parametrize(("column", "what"), [("patient", "patients"), ("duplicate_group", "duplicate groups")])
def test_a_leak_between_splits_is_found_and_told(tmp_path: Path, column: str, what: str) -> None:
    facts = gather(corpus(tmp_path / "corpus", **{column: "same"}))
    assert facts.wrong == (f"1 {what} are both train and val",)
    text = page(facts)
    assert "breaks its own claims" in text
    assert "No patient, duplicate group" not in text


def test_equal_pixels_across_splits_are_found_without_trusting_the_groups(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    rows[4]["content"], rows[4]["sha256"] = rows[0]["content"], rows[0]["sha256"]
    facts = gather(save(folder, rows))
    assert [proof.shared for proof in facts.proofs] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    for row in rows:
        row["content"] = ""  # uniform slices say nothing
    assert [proof.shared for proof in gather(save(folder, rows)).proofs] == [0] * 10


def test_another_fingerprint_than_recorded_is_told(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    (folder / "corpus.json").write_text('{"fingerprint": "feed"}')
    outcome = main(Settings(folder=folder))
    assert not outcome.ok
    assert "corpus.json names the fingerprint feed" in outcome.next[0]


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("index.parquet", None, r"index\.parquet is missing.*axial curate"),
        ("index.parquet", b"PAR1 no", r"index\.parquet cannot be read.*axial curate"),
        ("corpus.json", None, r"corpus\.json is missing.*axial curate"),
        ("corpus.json", b"{", r"corpus\.json is damaged.*axial curate"),
        ("corpus.json", b"[]", r"not a JSON object.*axial curate"),
        ("refused.parquet", None, r"refused\.parquet is missing.*axial curate"),
        ("shards/000.tar", None, r"000\.tar is missing.*axial curate"),
        ("shards/000.tar", b"short", r"000\.tar is cut short.*axial curate"),
    ],
)
def test_a_partial_corpus_is_refused(tmp_path: Path, file: str, damage: bytes | None, words: str) -> None:
    folder = corpus(tmp_path / "corpus")
    if damage is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(damage)
    with pytest.raises(CorpusError, match=words):
        main(Settings(folder=folder))
    assert not (folder / "report.html").exists()


def test_an_empty_corpus_names_the_reasons(tmp_path: Path) -> None:
    folder = save(tmp_path, [])
    reasons = r"5 truncated, 1 held_out, 1 held_out_related, 1 <script>"
    with pytest.raises(CorpusError, match=rf"lists no slice \({reasons}\).*private/refused\.csv.*axial curate"):
        main(Settings(folder=folder))


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    table = pq.read_table(folder / "index.parquet").drop_columns(["content"])
    pq.write_table(table, folder / "index.parquet")
    with pytest.raises(CorpusError, match=r"no column content.*axial curate"):
        main(Settings(folder=folder))


def test_contact_sheet_keeps_millimetres_and_window() -> None:
    from data_curation.report_facts import Tile

    flat = np.full((50, 100), 40, np.int16)
    sheet = contact_sheet([Tile("a", flat, (4.0, 1.0)), Tile("b", np.full((300, 300), 5000, np.int16), (1.0, 1.0))])
    assert sheet.shape == (TILE, 2 * TILE)
    columns = np.flatnonzero(sheet[:, :TILE].any(0))  # 200 mm high, 100 mm wide: half the tile's width
    assert len(columns) == pytest.approx(TILE / 2, abs=1)
    assert sheet[TILE // 2, TILE // 2] == 128
    assert (sheet[:, TILE:] == 255).all()
