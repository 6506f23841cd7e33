"""Phantoms on disk, in the layouts that public CT collections use.

Every writer takes the root folder and (number, phantom) pairs, stores the images with the turned axes in which such a
collection arrives, and returns the image files or DICOM folders in order. SimpleITK is imported only when one writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data_curation.phantom import Phantom

__all__ = ["LAYOUTS", "write_dicom"]

Cases = Iterable[tuple[int, "Phantom"]]
Writer = Callable[..., list[Path]]


def _image(array: NDArray[Any], phantom: Phantom) -> Any:
    """SimpleITK image of [Z, Y, X] in LPS, the middle of the volume at a place that is not the origin."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(phantom.spacing[::-1])
    image.SetOrigin(
        [12.5 - (n - 1) / 2 * step for n, step in zip(array.shape[::-1], phantom.spacing[::-1], strict=True)]
    )
    return image


def _write(image: Any, path: Path, orientation: str = "LPS") -> Path:
    """Writes the image with its voxels stored in this orientation (the patient stays where it is)."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path), useCompression=True)
    return path


def _choose(phantom: Phantom, organs: Iterable[str] | None) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """The labels of these organs, renumbered 1, 2, ... in the order given; None keeps them all."""
    numbers = {name: label for label, name in phantom.names.items()}
    wanted = list(numbers) if organs is None else list(organs)
    unknown = [name for name in wanted if name not in numbers]
    if unknown:
        raise ValueError(f"the phantom has no organ {', '.join(unknown)}; it has {', '.join(numbers)}")
    table = np.zeros(256, np.uint8)
    for new, name in enumerate(wanted, 1):
        table[numbers[name]] = new
    return table[phantom.labels], {name: new for new, name in enumerate(wanted, 1)}


def _folder(
    root: Path, cases: Cases, *, orientations: Iterable[str] = ("RAS", "LPS", "PIR", "LAS", "ASL", "RPI")
) -> list[Path]:
    """case_NNNN.nii.gz in one folder, each with its voxels stored in another orientation."""
    turns = list(orientations)
    return [_write(_image(p.hu, p), root / f"case_{n:04d}.nii.gz", turns[n % len(turns)]) for n, p in cases]


def _nnunet(
    root: Path, cases: Cases, *, organs: Iterable[str] | None = None, tests: int = 0, name: str = "Phantom"
) -> list[Path]:
    """nnU-Net's raw data-set format, version 2; the last `tests` cases go to imagesTs with their labels in labelsTs."""
    made: list[Path] = []
    labels: dict[str, int] = {}
    training = 0
    everything = list(cases)
    for position, (n, p) in enumerate(everything):
        part = "Ts" if position >= len(everything) - tests else "Tr"
        chosen, labels = _choose(p, organs)
        case = f"{name.lower()}_{n:04d}"
        made.append(_write(_image(p.hu, p), root / f"images{part}" / f"{case}_0000.nii.gz"))
        _write(_image(chosen, p), root / f"labels{part}" / f"{case}.nii.gz")
        training += part == "Tr"
    described = {
        "name": name,
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **labels},
        "numTraining": training,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")
    return made


# Folder, file stem and labels of the CT tasks, and the organs that stand for the labels (no phantom has a tumour).
_MSD: dict[str, tuple[str, tuple[str, ...], tuple[str | None, ...]]] = {
    "Task03_Liver": ("liver_{}", ("liver", "cancer"), ("liver", None)),
    "Task06_Lung": ("lung_{:03d}", ("cancer",), (None,)),
    "Task07_Pancreas": ("pancreas_{:03d}", ("pancreas", "cancer"), ("pancreas", None)),
    "Task08_HepaticVessel": ("hepaticvessel_{:03d}", ("Vessel", "Tumour"), (None, None)),
    "Task09_Spleen": ("spleen_{}", ("spleen",), ("spleen",)),
    "Task10_Colon": ("colon_{:03d}", ("colon cancer primaries",), (None,)),
}


def _msd(root: Path, cases: Cases, *, task: str = "Task09_Spleen", tests: int = 0) -> list[Path]:
    """A Medical Segmentation Decathlon task below root/TASK; the last `tests` cases are its unlabelled test images."""
    if task not in _MSD:
        raise ValueError(f"no CT task {task!r} in the Decathlon; there are {', '.join(_MSD)}")
    stem, names, organs = _MSD[task]
    made: list[Path] = []
    train: list[dict[str, str]] = []
    test: list[str] = []
    everything = list(cases)
    for position, (n, p) in enumerate(everything):
        file = f"{stem.format(n)}.nii.gz"
        held = position >= len(everything) - tests
        made.append(_write(_image(p.hu, p), root / task / ("imagesTs" if held else "imagesTr") / file, "LAS"))
        if held:
            test.append(f"./imagesTs/{file}")
            continue
        numbers = {name: label for label, name in p.names.items()}
        labels = np.zeros_like(p.labels)
        for value, organ in enumerate(organs, 1):
            if organ is not None:
                labels[p.labels == numbers[organ]] = value
        _write(_image(labels, p), root / task / "labelsTr" / file, "LAS")
        train.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    described = {
        "name": task.split("_")[1],
        "description": "Made-up phantoms",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(i): name for i, name in enumerate(names, 1)}},
        "numTraining": len(train),
        "numTest": len(test),
        "training": train,
        "test": test,
    }
    (root / task / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")
    return made


def _totalsegmentator(root: Path, cases: Cases, *, tests: int = 0) -> list[Path]:
    """sNNNN/ct.nii.gz, a binary file an organ, and meta.csv with the split; the last `tests` cases are "test"."""
    made, rows = [], ["image_id;age;gender;institute;study_type;split"]
    everything = list(cases)
    for position, (n, p) in enumerate(everything):
        case = root / f"s{n:04d}"
        made.append(_write(_image(p.hu, p), case / "ct.nii.gz", "RAS"))
        for label, name in p.names.items():
            _write(_image((p.labels == label).astype(np.uint8), p), case / "segmentations" / f"{name}.nii.gz", "RAS")
        rows.append(f"{case.name};60;m;A;ct abdomen;{'test' if position >= len(everything) - tests else 'train'}")
    (root / "meta.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return made


_CHAOS_TRAIN = (1, 2, 5, 6, 8, 10, 14, 16, 18, 19, *range(21, 31))
_CHAOS_TEST = (3, 4, 7, 9, 11, 12, 13, 15, 17, 20, *range(31, 41))


def _chaos(root: Path, cases: Cases, *, tests: int = 0) -> list[Path]:
    """Train_Sets/CT/ID/DICOM_anon/*.dcm with PNG liver masks under Ground, Test_Sets without; ids as in the original.

    File i and mask i belong together; in every second case they run from head to foot.
    """
    import imagecodecs

    everything = list(cases)
    train = len(everything) - tests
    if train > len(_CHAOS_TRAIN) or tests > len(_CHAOS_TEST):
        raise ValueError(
            f"CHAOS has {len(_CHAOS_TRAIN)} training and {len(_CHAOS_TEST)} test cases, asked for {train} and {tests}"
        )
    made = []
    for position, (n, p) in enumerate(everything):
        held = position >= train
        number = _CHAOS_TEST[position - train] if held else _CHAOS_TRAIN[position]
        case = root / ("Test_Sets" if held else "Train_Sets") / "CT" / str(number)
        order = range(len(p.hu)) if position % 2 == 0 else range(len(p.hu) - 1, -1, -1)
        made.append(write_dicom(p, case / "DICOM_anon", n, order))
        if not held:
            (case / "Ground").mkdir(parents=True, exist_ok=True)
            liver = next(label for label, name in p.names.items() if name == "liver")
            for i, z in enumerate(order):
                mask = np.where(p.labels[z] == liver, 255, 0).astype(np.uint8)
                (case / "Ground" / f"liver_GT_{i:03d}.png").write_bytes(imagecodecs.png_encode(mask))
    return made


def _uid(*parts: object) -> str:
    """A DICOM UID that depends on `parts` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def write_dicom(phantom: Phantom, folder: Path, number: int, order: Iterable[int] | None = None) -> Path:
    """One axial CT series, a file a slice in this order of z, stored as HU + 1024. Name, id and date are made up."""
    import SimpleITK as sitk

    folder.mkdir(parents=True, exist_ok=True)
    image = _image(phantom.hu, phantom)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    series = {
        "0008|0005": "ISO_IR 100",
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
        "0008|0012": "20200102",
        "0008|0013": "030405",
        "0008|0020": "20200102",
        "0008|0030": "030405",
        "0008|0060": "CT",
        "0008|0070": "Axial",
        "0010|0010": f"Phantom^Number{number}",
        "0010|0020": f"PHANTOM{number:04d}",
        "0018|0050": str(phantom.spacing[0]),
        "0018|5100": "HFS",
        "0020|000d": _uid(number, phantom.hu.shape, "study"),
        "0020|000e": _uid(number, phantom.hu.shape, "series"),
        "0020|0052": _uid(number, phantom.hu.shape, "frame"),
        "0020|0011": "2",
        "0028|1052": "-1024",
        "0028|1053": "1",
        "0028|1054": "HU",
    }
    for i, z in enumerate(range(len(phantom.hu)) if order is None else order):
        one = image[:, :, z : z + 1]
        own = {"0008|0018": _uid(number, phantom.hu.shape, "slice", z), "0020|0013": str(i + 1)}
        for key, value in (series | own).items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"i{i:04d},0000b.dcm"))
        writer.Execute(one)
    return folder


LAYOUTS: Mapping[str, Writer] = MappingProxyType(
    {"folder": _folder, "msd": _msd, "totalsegmentator": _totalsegmentator, "chaos": _chaos, "nnunet": _nnunet}
)
