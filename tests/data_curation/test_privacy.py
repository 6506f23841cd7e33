"""Identifiers planted in every kind of file, and in names, are nowhere outside private/, nor on the console."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk
import yaml
from numpy.typing import NDArray

from data_curation.corpus import Corpus
from data_curation.verify import verify
from tests.data_curation.conftest import WriteScan
from tests.data_curation.test_dicom import slice_at, write

REPOSITORY = Path(__file__).resolve().parents[2]

PLANTED = {  # each is looked for as it stands, in any case of letters
    "name": "Zyxfrau^Quintilia", "id": "ZQPAT4711", "birth": "19370815", "accession": "ACCZQ90210",
    "study": "1.2.826.77.1", "series": "1.2.826.77.2", "instance": "1.2.826.77.3", "date": "19991231",
    "institution": "Klinikum Zqstadt", "referring": "Zqarzt", "private tag": "ZQPRIVATETAG",
    "series text": "ZQseriestext",
    "folder": "zqfolder_meier", "dicom file": "ZqDicomFile", "nifti file": "zqniftifile", "nrrd file": "zqnrrdfile",
    "mha file": "zqmhafile", "broken file": "ZqBrokenMeier", "refused file": "zqsmall_schulze",
    "descrip": "ZQdescrip", "aux": "ZQauxfile", "intent": "ZQintent", "db": "ZQdbname", "extension": "ZQextension",
    "nrrd comment": "ZQnrrdcomment", "nrrd value": "ZQnrrdvalue", "nrrd content": "ZQnrrdcontent",
    "mha comment": "ZQmhacomment", "mha field": "ZQmhafield",
}  # fmt: skip
NAMES = re.compile("|".join(re.escape(text) for text in PLANTED.values()), re.IGNORECASE)
DICOM, NIFTI, NRRD, MHA = "set-a", "set-b", "set-c", "set-d"


def dicom(folder: Path, hu: NDArray[np.int16]) -> None:
    slices = []
    for z, plane in enumerate(hu):
        data = slice_at(
            2.5 * z, hu=plane, PatientName=PLANTED["name"], PatientID=PLANTED["id"], PatientBirthDate=PLANTED["birth"],
            AccessionNumber=PLANTED["accession"], StudyInstanceUID=PLANTED["study"],
            SeriesInstanceUID=PLANTED["series"], SOPInstanceUID=f"{PLANTED['instance']}.{z}",
            InstitutionName=PLANTED["institution"], ReferringPhysicianName=PLANTED["referring"],
            StudyDate=PLANTED["date"], SeriesDescription=PLANTED["series text"],
        )  # fmt: skip
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.private_block(0x0099, "ZQ", create=True).add_new(1, "LO", PLANTED["private tag"])
        slices.append(data)
    write(folder / PLANTED["folder"], *slices, names=PLANTED["dicom file"] + "{}.dcm")


def nifti(folder: Path, hu: NDArray[np.int16]) -> None:
    path = folder / PLANTED["folder"] / f"{PLANTED['nifti file']}.nii"
    path.parent.mkdir(parents=True)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.75, 0.8, 2.5))
    sitk.WriteImage(image, str(path))
    raw = bytearray(path.read_bytes())
    for at, name in ((14, "db"), (148, "descrip"), (228, "aux"), (328, "intent")):
        raw[at : at + len(PLANTED[name])] = PLANTED[name].encode()
    struct.pack_into("<f", raw, 108, 384.0)
    extension = struct.pack("<ii", 32, 6) + PLANTED["extension"].encode().ljust(24, b"\0")
    path.write_bytes(bytes(raw[:348]) + b"\1\0\0\0" + extension + bytes(raw[352:]))


def nrrd(folder: Path, hu: NDArray[np.int16]) -> None:
    path = folder / PLANTED["folder"] / f"{PLANTED['nrrd file']}.nrrd"
    path.parent.mkdir(parents=True)
    lines = [
        "NRRD0005", f"# {PLANTED['nrrd comment']}", "type: int16", "dimension: 3", "space: left-posterior-superior",
        f"content: {PLANTED['nrrd content']}", f"sizes: {hu.shape[2]} {hu.shape[1]} {hu.shape[0]}",
        "space directions: (0.75,0,0) (0,0.8,0) (0,0,2.5)", "space origin: (0,0,0)", "endian: little", "encoding: raw",
        f"patient:={PLANTED['nrrd value']}", "", "",
    ]  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + hu.astype("<i2").tobytes())


def mha(folder: Path, hu: NDArray[np.int16]) -> None:
    path = folder / PLANTED["folder"] / f"{PLANTED['mha file']}.mha"
    path.parent.mkdir(parents=True)
    lines = [
        "ObjectType = Image", "NDims = 3", f"Comment = {PLANTED['mha comment']}", f"Name = {PLANTED['mha field']}",
        "BinaryData = True", "BinaryDataByteOrderMSB = False", "CompressedData = False",
        "TransformMatrix = 1 0 0 0 1 0 0 0 1", "Offset = 0 0 0", "ElementSpacing = 0.75 0.8 2.5",
        f"DimSize = {hu.shape[2]} {hu.shape[1]} {hu.shape[0]}", "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL", "",
    ]  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + hu.astype("<i2").tobytes())


def broken(folder: Path, name: str) -> None:
    """Every image of the folder once more, cut in half, under the name of a patient; and one too small to keep."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place = folder / PLANTED["broken file"] / f"{PLANTED['broken file']}{path.suffix}"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            break
    small = sitk.GetImageFromArray(np.zeros((1, 8, 8), np.int16))
    sitk.WriteImage(small, str(folder / f"{PLANTED['refused file']}_{name}.nrrd"))
    (folder / f"{PLANTED['refused file']}.pdf").write_bytes(b"%PDF")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, write_scan: WriteScan) -> Path:
    """Four data sets in folders of neutral names; the identifiers are in all that is below."""
    root = tmp_path_factory.mktemp("planted")
    scratch = root / "scratch.nrrd"
    for seed, (name, make) in enumerate({DICOM: dicom, NIFTI: nifti, NRRD: nrrd, MHA: mha}.items()):
        make(root / name, write_scan(scratch, seed, depth=6))
        broken(root / name, name)
    scratch.unlink()
    found = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    named = "\n".join(path.relative_to(root).as_posix() for path in root.rglob("*"))
    for what, text in PLANTED.items():
        assert text.encode() in found or text in named, f"{what} was not planted"
    return root


def axial(*words: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, so that what libraries print is seen too."""
    command = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def write_settings(planted: Path, folder: Path, **more: object) -> Path:
    sets = [{"name": "folder", "root": str(planted / n), "id": n, "licence": "CC0"} for n in (DICOM, NIFTI, NRRD, MHA)]
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"folder": str(folder), "datasets": sets, "salt": "pepper", "workers": 1, **more}))
    return path


@pytest.fixture(scope="module")
def made(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The corpus of it with its report, and all that was printed on the way."""
    folder = tmp_path_factory.mktemp("made") / "corpus"
    printed = ""
    for words in (
        ("curate", str(write_settings(planted, folder))),
        ("report", f"folder={folder}"),
        ("verify", f"folder={folder}", "workers=1"),
    ):
        done = axial(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout + done.stderr
    return folder, printed


def found_in(data: bytes) -> list[str]:
    """Planted texts in these bytes, as ASCII or UTF-16."""
    wide = [data[start:].decode(name, "replace") for start in (0, 1) for name in ("utf-16-le", "utf-16-be")]
    texts = [data.decode("latin-1"), *wide]
    return sorted({hit for text in texts for hit in NAMES.findall(text)})


def test_the_search_finds_what_is_there() -> None:
    for text in PLANTED.values():
        for encoding in ("ascii", "utf-16-le", "utf-16-be"):
            assert found_in(b"x" + text.lower().encode(encoding) + b"y"), (text, encoding)


def test_every_format_was_kept_and_every_damage_refused(made: tuple[Path, str]) -> None:
    folder, _ = made
    assert {Corpus(folder, None).dataset(i) for i in range(len(Corpus(folder, None)))} == {DICOM, NIFTI, NRRD, MHA}
    refused = pq.read_table(folder / "refused.parquet").to_pylist()
    assert {row["dataset"] for row in refused} == {DICOM, NIFTI, NRRD, MHA}
    assert set(refused[0]) == {"dataset", "volume", "reason"}
    assert verify(folder) == ()


def test_nothing_outside_private_names_anybody(made: tuple[Path, str], planted: Path) -> None:
    folder, _ = made
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "private"]
    assert {"index.parquet", "corpus.json", "report.html", "report.png", "refused.parquet", "left_out.parquet"} <= {
        path.name for path in files
    }
    assert len([path for path in files if path.suffix == ".tar"]) >= 1
    for path in files:
        assert found_in(path.read_bytes()) == [], path
        assert found_in(path.name.encode()) == []
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            assert found_in(repr((table.to_pylist(), table.schema.metadata, path.name)).encode()) == [], path
        if path.name not in ("settings.yaml", "run.json", "outcome.json"):  # these are the user's own
            assert str(planted).encode() not in path.read_bytes(), path
            assert str(folder).encode() not in path.read_bytes(), path


def test_what_is_private_says_the_rest(made: tuple[Path, str]) -> None:
    folder, _ = made
    refused = (folder / "private" / "refused.csv").read_text()
    for name in ("broken file", "refused file"):
        assert PLANTED[name] in refused
    sources = (folder / "private" / "sources.csv").read_text()
    assert PLANTED["id"] in sources
    assert PLANTED["nifti file"] in sources
    assert (folder / "private").stat().st_mode & 0o077 == 0


def test_nothing_printed_names_anybody(made: tuple[Path, str]) -> None:
    _, printed = made
    assert "data set" in printed
    assert found_in(printed.encode()) == []


def test_a_dry_run_names_nobody(planted: Path, tmp_path: Path) -> None:
    done = axial("curate", str(write_settings(planted, tmp_path / "dry")), "--dry-run")
    assert done.returncode == 0
    assert "volumes to read" in done.stdout
    assert found_in((done.stdout + done.stderr).encode()) == []


def test_a_run_that_must_stop_names_nobody(planted: Path, tmp_path: Path) -> None:
    """A finished scan is changed before the corpus is extended: its hash is said, not the file."""
    root, folder = tmp_path / "scans", tmp_path / "corpus"
    shutil.copytree(planted, root)
    config = str(write_settings(root, folder, extend=True))
    assert axial("curate", config).returncode == 0
    image = next((root / NIFTI).rglob(f"{PLANTED['nifti file']}.nii"))
    raw = bytearray(image.read_bytes())
    raw[-2] ^= 1
    image.write_bytes(raw)
    done = axial("curate", config)
    assert done.returncode == 2
    assert "private/sources.csv" in done.stderr
    assert found_in((done.stdout + done.stderr).encode()) == []
    assert found_in((folder / "outcome.json").read_bytes()) == []


def test_the_folder_of_cases_to_be_scored_is_not_named(planted: Path, tmp_path: Path) -> None:
    scored = tmp_path / PLANTED["folder"]
    shutil.copytree(planted / NRRD / PLANTED["folder"], scored / "imagesTs")
    config = write_settings(planted, tmp_path / "corpus", evaluation=[{"root": str(scored)}])
    done = axial("curate", str(config))
    assert done.returncode == 0
    assert found_in((done.stdout + done.stderr).encode()) == []
    for name in ("corpus.json", "refused.parquet"):
        assert found_in((tmp_path / "corpus" / name).read_bytes()) == []
