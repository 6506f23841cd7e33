"""The report: its numbers are the index's, a leak is found and told, texts stay text, half a corpus is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation.index import SCHEMA, CorpusError, fingerprint
from data_curation.phantom import make
from data_curation.report import Settings, gather, main
from data_curation.report_page import page
from data_curation.report_pictures import TILE, contact_sheet
from data_curation.slices import Slice, encode

PATIENTS = [("chaos", "a", "train"), ("chaos", "b", "val"), ("msd_spleen", "c", "train"), ("<b>odd</b>", "d", "train")]


def corpus(folder: Path, **changes: object) -> Path:
    """A corpus as `axial curate` leaves it, one volume of four slices a patient; `changes` overwrite columns."""
    (folder / "shards").mkdir(parents=True)
    rows, blob = [], b""
    for number, (dataset, patient, split) in enumerate(PATIENTS):
        phantom = make(number, (4, 40, 48), (30.0, 9.0, 7.5))
        for z, hu in enumerate(phantom.hu):
            stored = encode(hu)
            one = Slice(z, hu, float((hu > -500).mean()))
            rows.append(
                {
                    "key": f"{patient * 8}_{z:04d}", "dataset": dataset, "volume": patient * 8, "patient": patient,
                    "study": patient, "z": z, "position_mm": 30.0 * z, "n_slices": 4, "height": 40, "width": 48,
                    "spacing_z": 30.0 - number, "spacing_y": 9.0, "spacing_x": 7.5, **one.statistics(),
                    "body_fraction": one.body_fraction, "rounding": 0.0, "notes": "", "sha256": one.sha256,
                    "content": one.content, "licence": "CC BY 4.0", "held_out": "", "split": split,
                    "duplicate_group": patient * 8, "duplicate": False, "codec": "j2c", "shard": "000.tar",
                    "offset": len(blob), "size": len(stored), "crc32": zlib.crc32(stored), **changes,
                }
            )  # fmt: skip
            blob += stored
    (folder / "shards" / "000.tar").write_bytes(blob)
    return save(folder, rows)


def save(folder: Path, rows: list[dict[str, object]]) -> Path:
    index = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(index, folder / "index.parquet")
    (folder / "corpus.json").write_text(
        json.dumps({"fingerprint": fingerprint(index), "datasets": {"<b>odd</b>": {"catalogue": "totalsegmentator"}}})
    )
    refused = [("chaos", f"Train_Sets/{i}.dcm", "truncated", "cut short") for i in range(5)]
    refused.append(("folder", "<script>alert(1)</script>.nii", "not_ct", 'PET & "SUV"'))
    columns = zip(*refused, strict=True)
    pq.write_table(
        pa.table(dict(zip(("dataset", "source", "reason", "detail"), columns, strict=True))), folder / "refused.parquet"
    )
    return folder


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
    outcome = main(Settings(folder=folder, listing=3))
    assert outcome.ok
    assert [Path(made).name for made in outcome.made] == ["report.html", "report.png"]
    assert all(hashlib.sha256(path.read_bytes()).digest() == digest for path, digest in before.items())
    assert sorted(path.name for path in folder.iterdir() if path not in before and path.is_file()) == [
        "report.html",
        "report.png",
    ]
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
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.nii" in text
    assert "PET &amp; &quot;SUV&quot;" in text
    assert "&lt;b&gt;odd&lt;/b&gt;" in text
    assert "<b>odd" not in text
    assert "and 2 more in refused.csv" in text
    assert "Kavur A. E." in text
    assert "Wasserthal J." in text  # under the name that corpus.json gives it in the catalogue
    assert "Nothing was kept of folder (1 refused)" in text
    assert "prefers-color-scheme: dark" in text
    shape = imagecodecs.png_decode((folder / "report.png").read_bytes()).shape
    assert min(shape[:2]) > 600


def test_facts_are_those_of_the_index(tmp_path: Path) -> None:
    facts = gather(Settings(folder=corpus(tmp_path / "corpus"), tiles=3, sample=4))
    chaos = next(s for s in facts.sets if s.name == "chaos")
    assert (chaos.patients, chaos.volumes, chaos.slices, chaos.duplicates, chaos.held_out) == (2, 2, 8, 0, 0)
    assert chaos.between == (29.0, 30.0)
    assert chaos.within == (7.5, 7.5)
    index = pq.read_table(tmp_path / "corpus" / "index.parquet")
    assert sum(s.size for s in facts.sets) == sum(index["size"].to_pylist())
    assert [(s.name, s.slices, s.volumes, s.patients, s.groups) for s in facts.splits] == [
        ("train", 12, 3, 3, 3),
        ("val", 4, 1, 1, 1),
    ]
    assert [(proof.shared, proof.total) for proof in facts.proofs] == [(0, 4), (0, 4), (0, 16), (0, 16)]
    assert [(r.reason, r.count, len(r.rows)) for r in facts.refusals] == [("truncated", 5, 5), ("not_ct", 1, 1)]
    assert facts.refused == {"chaos": 5, "folder": 1}
    assert facts.depth["chaos"].tolist() == [4, 4]
    assert all(shares.sum() == pytest.approx(1) for shares in facts.hu.values())
    assert len(facts.tiles["msd_spleen"]) == 3
    wanted = make(2, (4, 40, 48), (30.0, 9.0, 7.5)).hu
    assert any(np.array_equal(facts.tiles["msd_spleen"][1].hu, plane) for plane in wanted)


@pytest.mark.parametrize(("column", "what"), [("patient", "patients"), ("duplicate_group", "duplicate groups")])
def test_a_leak_between_splits_is_found_and_told(tmp_path: Path, column: str, what: str) -> None:
    facts = gather(Settings(folder=corpus(tmp_path / "corpus", **{column: "same"})))
    assert facts.wrong == (f"1 {what} in more than one split",)
    text = page(facts)
    assert "breaks its own claims" in text
    assert "No patient, duplicate group" not in text


def test_equal_pixels_across_splits_are_found_without_trusting_the_groups(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    rows[4]["content"], rows[4]["sha256"] = rows[0]["content"], rows[0]["sha256"]
    facts = gather(Settings(folder=save(folder, rows)))
    assert [proof.shared for proof in facts.proofs] == [0, 0, 1, 1]
    for row in rows:
        row["content"] = ""  # uniform slices say nothing
    assert [proof.shared for proof in gather(Settings(folder=save(folder, rows))).proofs] == [0, 0, 0, 0]


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
    with pytest.raises(CorpusError, match=r"lists no slice \(5 truncated, 1 not_ct\).*refused\.csv.*axial curate"):
        main(Settings(folder=folder))


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    table = pq.read_table(folder / "index.parquet").drop_columns(["content"])
    pq.write_table(table, folder / "index.parquet")
    with pytest.raises(CorpusError, match=r"no column content.*axial curate"):
        main(Settings(folder=folder))


def test_contact_sheet_keeps_millimetres_and_window() -> None:
    from data_curation.report import Tile

    flat = np.full((50, 100), 40, np.int16)
    sheet = contact_sheet([Tile("a", flat, (4.0, 1.0)), Tile("b", np.full((300, 300), 5000, np.int16), (1.0, 1.0))])
    assert sheet.shape == (TILE, 2 * TILE)
    columns = np.flatnonzero(sheet[:, :TILE].any(0))  # 200 mm high, 100 mm wide: half the tile's width
    assert len(columns) == pytest.approx(TILE / 2, abs=1)
    assert sheet[TILE // 2, TILE // 2] == 128
    assert (sheet[:, TILE:] == 255).all()
