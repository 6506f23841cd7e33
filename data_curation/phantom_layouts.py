"""Phantoms on disk, in the layouts in which public CT collections are downloaded.

LAYOUTS has a writer for every entry of the catalogue, and `nnunet`. A writer takes the root folder and (number,
phantom) pairs and returns the image files or DICOM folders in order. The number is the case's number in the data set;
the last `tests` cases are of its test set, in layouts that have one in places of its own. Axes are turned, files called
._x and lost headers are put in where the real archives have them. SimpleITK is imported only when one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_curation.catalogue import CATALOGUE
from data_curation.phantom_files import numbered, structures, write_dicom, write_nifti

if TYPE_CHECKING:
    from data_curation.phantom import Phantom

__all__ = ["LAYOUTS"]

Cases = Iterable[tuple[int, "Phantom"]]
Writer = Callable[..., list[Path]]
TURNS = ("RAS", "LPS", "PIR", "LAS", "ASL", "RPI")


@dataclass(frozen=True)
class _Files:
    """Where a data set keeps one file an image and one a label; {n} is the number of the case."""

    image: str
    label: str
    test: str = ""
    test_label: str = ""
    axes: tuple[str, ...] = ("LAS",)  # of the stored voxels, from case to case
    padding: int | None = None  # HU outside the scanner's round field of view
    junk: tuple[str, ...] = ()


_MAC = ("amos22/__MACOSX/imagesTr/._amos_0001.nii.gz", "__MACOSX/amos22/imagesTr/._amos_0001.nii.gz")
_FILES: Mapping[str, _Files] = {
    "btcv": _Files(
        "RawData/Training/img/img{n:04d}.nii.gz",
        "RawData/Training/label/label{n:04d}.nii.gz",
        "RawData/Testing/img/img{n:04d}.nii.gz",
    ),
    "lits": _Files("{batch}/volume-{n}.nii", "{batch}/segmentation-{n}.nii", "test-volume-{n}.nii", axes=TURNS[:4]),
    "kits23": _Files("dataset/case_{n:05d}/imaging.nii.gz", "dataset/case_{n:05d}/segmentation.nii.gz", axes=("IPR",)),
    "word": _Files(
        "WORD-V0.1.0/imagesTr/word_{n:04d}.nii.gz",
        "WORD-V0.1.0/labelsTr/word_{n:04d}.nii.gz",
        "WORD-V0.1.0/imagesTs/word_{n:04d}.nii.gz",
        "WORD-V0.1.0/labelsTs/word_{n:04d}.nii.gz",
        padding=-3024,
    ),
    "abdomenct_1k": _Files(
        "AbdomenCT-1K-ImagePart{part}/Case_{n:05d}_0000.nii.gz", "Mask/Case_{n:05d}.nii.gz", axes=("LAS", "RAS")
    ),
    "amos22": _Files(
        "amos22/imagesTr/amos_{n:04d}.nii.gz",
        "amos22/labelsTr/amos_{n:04d}.nii.gz",
        "amos22/imagesTs/amos_{n:04d}.nii.gz",
        junk=_MAC,
    ),
    "ct_org": _Files("volume-{n}.nii.gz", "labels-{n}.nii.gz", axes=("LAS", "RAS")),
}


def _files(name: str, root: Path, cases: Cases, *, tests: int = 0) -> list[Path]:
    """Writes what _FILES says of this data set."""
    files, entry = _FILES[name], CATALOGUE[name]
    if tests and not files.test:
        raise ValueError(f"layout {name} has no place of its own for test cases: leave out tests={tests}")
    made = []
    for n, p, test in _parted(cases, tests):
        fields = {"n": n, "batch": f"Training Batch {1 if n < 28 else 2}", "part": 1 + n % 3}
        hu, labels = _round(p, numbered(p, entry.labels or {}), files.padding)
        whole = test or entry.bogus_spacing.isdisjoint((str(n), f"Case_{n:05d}"))
        axes = files.axes[n % len(files.axes)] if whole else "RAS"
        image = root / (files.test if test else files.image).format(**fields)
        label = (files.test_label if test else files.label).format(**fields)
        made.append(write_nifti(hu, p, image, axes, header=whole))
        if label:
            write_nifti(labels, p, root / label, axes, header=whole)
    for path in files.junk:
        _junk(root / path)
    return made


def _parted(cases: Cases, tests: int) -> Sequence[tuple[int, Phantom, bool]]:
    """(number, phantom, is it a test case)."""
    everything = list(cases)
    return [(n, p, position >= len(everything) - tests) for position, (n, p) in enumerate(everything)]


def _round(p: Phantom, labels: NDArray[np.uint8], padding: int | None) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """HU and labels with `padding` outside the circle that the scanner sees."""
    if padding is None:
        return p.hu, labels
    y, x = (np.linspace(-1, 1, n) for n in p.hu.shape[1:])
    outside = np.hypot(y[:, None], x) > 1
    return np.where(outside, np.int16(padding), p.hu), np.where(outside, np.uint8(0), labels)


def _junk(path: Path) -> None:
    """What macOS leaves beside a file: attributes under the file's name, which are no scan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")


def _folder(root: Path, cases: Cases) -> list[Path]:
    """case_NNNN.nii.gz in one folder, each with its voxels stored in another orientation."""
    return [write_nifti(p.hu, p, root / f"case_{n:04d}.nii.gz", TURNS[n % len(TURNS)]) for n, p in cases]


def _nnunet(
    root: Path, cases: Cases, *, organs: Iterable[str] | None = None, tests: int = 0, name: str = "Phantom"
) -> list[Path]:
    """nnU-Net's raw data-set format, version 2, with these organs as 1, 2, ...; all of them without `organs`."""
    made: list[Path] = []
    wanted: list[str] = []
    training = 0
    for n, p, test in _parted(cases, tests):
        wanted = list(p.names.values()) if organs is None else list(organs)
        unknown = [organ for organ in wanted if organ not in p.names.values()]
        if unknown:
            have = ", ".join(p.names.values())
            raise ValueError(f"the phantom has no organ {', '.join(unknown)}; it has {have}")
        part, case = "Ts" if test else "Tr", f"{name.lower()}_{n:04d}"
        made.append(write_nifti(p.hu, p, root / f"images{part}" / f"{case}_0000.nii.gz"))
        write_nifti(numbered(p, dict(enumerate(wanted, 1))), p, root / f"labels{part}" / f"{case}.nii.gz")
        training += not test
    described = {
        "name": name,
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{organ: number for number, organ in enumerate(wanted, 1)}},
        "numTraining": training,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")
    return made


def _msd(name: str, root: Path, cases: Cases, *, tests: int = 0) -> list[Path]:
    """A task of the Medical Segmentation Decathlon, with its dataset.json."""
    entry = CATALOGUE[name]
    labels, task = entry.labels or {}, root / entry.folder
    stem = entry.folder.partition("_")[2].lower()
    wide = "{}" if stem in ("liver", "spleen") else "{:03d}"
    made: list[Path] = []
    train: list[dict[str, str]] = []
    test: list[str] = []
    for n, p, held in _parted(cases, tests):
        file = f"{stem}_{wide.format(n)}.nii.gz"
        made.append(write_nifti(p.hu, p, task / ("imagesTs" if held else "imagesTr") / file, "LAS"))
        _junk(made[-1].with_name(f"._{file}"))
        if held:
            test.append(f"./imagesTs/{file}")
            continue
        write_nifti(numbered(p, labels), p, task / "labelsTr" / file, "LAS")
        train.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    described = {
        "name": stem,
        "description": "Made-up phantoms",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(number): organ for number, organ in labels.items()}},
        "numTraining": len(train),
        "numTest": len(test),
        "training": train,
        "test": test,
    }
    (task / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")
    return made


def _totalsegmentator(root: Path, cases: Cases, *, tests: int = 0) -> list[Path]:
    """sNNNN/ct.nii.gz, a binary file an organ, and meta.csv with the split; the last `tests` cases are "test"."""
    made, rows = [], ["image_id;age;gender;institute;study_type;split"]
    for n, p, test in _parted(cases, tests):
        case = root / f"s{n:04d}"
        made.append(write_nifti(p.hu, p, case / "ct.nii.gz", "RAS"))
        structures(p, case / "segmentations", "RAS")
        rows.append(f"{case.name};60;m;A;ct abdomen;{'test' if test else 'train'}")
    (root / "meta.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return made


def _atlas(name: str, root: Path, cases: Cases) -> list[Path]:
    """AbdomenAtlas: a folder a case, in 1.1 every second one nested deeper, in 3.0 images and masks apart."""
    entry = CATALOGUE[name]
    first = CATALOGUE["abdomenatlas_1_1_mini"].labels or {}
    made = []
    for n, p in cases:
        case = f"BDMAP_{n:08d}"
        if name == "abdomenatlas_3_0_mini":
            image, masks = root / "image_only" / case, root / "mask_only" / case
        else:
            deeper = "AbdomenAtlas1.1Mini" if name == "abdomenatlas_1_1_mini" and n % 2 else ""
            image = masks = root / deeper / case
        axes = TURNS[n % 2]
        made.append(write_nifti(p.hu, p, image / "ct.nii.gz", axes))
        structures(p, masks / "segmentations", axes, (entry.labels or first).values())
        if entry.labels:
            write_nifti(numbered(p, entry.labels), p, masks / "combined_labels.nii.gz", axes)
    return made


def _chaos(root: Path, cases: Cases, *, tests: int = 0) -> list[Path]:
    """DICOM and PNG masks of the liver, under the ids of the original in order. File i and mask i belong together; in
    every second case they run from head to foot."""
    import imagecodecs

    entry = CATALOGUE["chaos"]
    everything = _parted(cases, tests)
    train = len(everything) - tests
    if train > len(entry.train_ids) or tests > len(entry.test_ids):
        have = f"{len(entry.train_ids)} training and {len(entry.test_ids)} test cases"
        raise ValueError(f"CHAOS has {have}, asked for {train} and {tests}")
    ids = (*entry.train_ids[:train], *entry.test_ids)
    made = []
    for position, (n, p, test) in enumerate(everything):
        case = root / ("Test_Sets" if test else "Train_Sets") / "CT" / ids[position]
        order = range(len(p.hu)) if position % 2 == 0 else range(len(p.hu) - 1, -1, -1)
        made.append(write_dicom(p, case / "DICOM_anon", n, order))
        if not test:
            (case / "Ground").mkdir(parents=True, exist_ok=True)
            liver = numbered(p, {255: "liver"})
            for i, z in enumerate(order):
                (case / "Ground" / f"liver_GT_{i:03d}.png").write_bytes(imagecodecs.png_encode(liver[z]))
    return made


def _pancreas_ct(root: Path, cases: Cases) -> list[Path]:
    """DICOM with rows from back to front, labels as NIfTI in a folder of their own."""
    made = []
    for n, p in cases:
        series = Path("Pancreas-CT", f"PANCREAS_{n:04d}", "11-24-2015-Pancreas", "99667-Pancreas")
        made.append(write_dicom(p, root / series, n, axes="LAS"))
        label = root / "TCIA_pancreas_labels-02-05-2017" / f"label{n:04d}.nii.gz"
        write_nifti(numbered(p, CATALOGUE["pancreas_ct"].labels or {}), p, label, "LAI")
    return made


LAYOUTS: Mapping[str, Writer] = MappingProxyType(
    {
        "folder": _folder,
        "nnunet": _nnunet,
        **{name: partial(_files, name) for name in _FILES},
        **{name: partial(_msd, name) for name in CATALOGUE if name.startswith("msd_")},
        **{name: partial(_atlas, name) for name in CATALOGUE if name.startswith("abdomenatlas_")},
        "totalsegmentator": _totalsegmentator,
        "chaos": _chaos,
        "pancreas_ct": _pancreas_ct,
    }
)
