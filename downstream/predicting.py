"""One image and one or several models in, one label map out, on the image's own grid."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_curation.volumes import Found, VolumeError
from downstream import geometry
from downstream.dicom_seg import on_one_affine, series_slices, write_seg
from downstream.ensemble import Ensemble
from downstream.geometry import Scan
from downstream.images import Image, read_image
from downstream.inference import Window, decided, probabilities, volume_scores

__all__ = ["label_image", "predict_image"]


def predict_image(
    ensemble: Ensemble,
    founds: Sequence[Found],
    path: Path,
    window: Window,
    scores: Path | None = None,
    otherwise: Path | None = None,
    tell: Callable[[Sequence[str]], None] = lambda notes: None,
) -> None:
    """Reads an image, a file a channel, and writes its label map: size, spacing, origin and directions are the first
    file's own. An ending `.dcm` makes a DICOM SEG. `scores` takes the probabilities [heads, k, j, i], as nnU-Net's.

    Where a file with one affine cannot say where the slices of a series lie, `otherwise`, a `.dcm`, is written instead;
    an even tilt can be said by a sheared affine where no SEG can be had. `tell` is given what is to be told of image
    and label map before that is there. VolumeError: it cannot be read, or nothing can place its slices. CaseError:
    channels that do not belong together.
    """
    channels = ensemble.headers[0].channels
    image = read_image(founds, [channel.kind for channel in channels], [channel.name for channel in channels])
    own, seg, notes = image.scan.own, path.suffix == ".dcm", image.scan.volume.notes
    slices = series_slices(founds[0], image.scan) if founds[0].kind == "dicom" else None
    crooked = ""
    if slices is not None and not seg:
        own, crooked = on_one_affine(slices, own)
        if crooked and otherwise is None:
            raise VolumeError("misplaced", f"{crooked}; use dicom=seg")
        seg = otherwise is not None and own is not image.scan.own
    if scores is None:
        array = label_image(ensemble, image, window, str(founds[0].path))
    else:
        with _Scores(scores, len(ensemble.labels.heads), image.scan) as kept:
            array = label_image(ensemble, image, window, str(founds[0].path), kept.put)
    if seg:
        assert slices is not None, "only DICOM series get a segmentation object"
        target = otherwise or path
        try:
            write_seg(target, array, slices, ensemble.labels, ensemble.digest, tell=lambda more: tell((*notes, *more)))
            return
        except VolumeError as fault:
            if otherwise is None or crooked:
                raise
            notes = (*notes, str(fault))
    if own is not image.scan.own:
        notes = (*notes, "its slices lean: the NIfTI says so by a sheared sform, which ITK does not read")
    tell(notes)
    geometry.write_labelmap(path, array, own, None if founds[0].kind == "dicom" else founds[0].path)


def label_image(
    ensemble: Ensemble, image: Image, window: Window, what: str, keep: Callable[[slice, Tensor], None] | None = None
) -> NDArray[np.uint8]:
    """Label values [k, j, i] on the grid of the image's first file. `keep` is given the probabilities of its slices in
    LPS order, [n, heads, Y, X], piece by piece."""
    scan, labels = image.scan, ensemble.labels
    found = np.empty(image.stored.shape[1:], np.uint8)
    for part, logits in volume_scores(ensemble.models, ensemble.headers, image.stored, scan.volume.spacing, window):
        found[part] = decided(logits, labels).cpu().numpy()
        if keep is not None:
            keep(part, probabilities(logits, labels))
    if not geometry.difference(scan.place, geometry.lps(scan.own)):
        return geometry.from_lps(found, scan.own)
    return geometry.align(found, scan.place, scan.own, what, least=0.0)  # the reader resampled an oblique volume


class _Scores:
    """Probabilities of a whole volume on their way into an .npz: they go through a file, not through memory."""

    def __init__(self, path: Path, heads: int, scan: Scan) -> None:
        if geometry.difference(scan.place, geometry.lps(scan.own)):
            text = "the image is oblique and was resampled, which probabilities do not survive; use probabilities=false"
            raise VolumeError("oblique", text)
        self.path, self.own = path, scan.own
        self.plain, self.packed = (path.with_name(f".{os.getpid()}.{path.stem}{end}") for end in (".npy", ".npz"))
        shape = (heads, *scan.own.size[::-1])
        self.array = np.lib.format.open_memmap(self.plain, "w+", np.float32, shape)

    def put(self, part: slice, given: Tensor) -> None:
        """Slices in LPS order, [n, heads, Y, X]."""
        values = given.float().cpu().numpy()
        for head in range(len(self.array)):
            geometry.to_lps(self.array[head], self.own)[part] = values[:, head]

    def __enter__(self) -> _Scores:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.array.flush()
        del self.array
        try:
            if kind is None:
                entry = zipfile.ZipInfo("probabilities.npy")  # of 1980, so that the same bytes come out
                entry.compress_type = zipfile.ZIP_DEFLATED
                with (
                    zipfile.ZipFile(self.packed, "w") as archive,
                    archive.open(entry, "w", force_zip64=True) as target,
                    self.plain.open("rb") as source,
                ):
                    while block := source.read(1 << 24):
                        target.write(block)
                os.replace(self.packed, self.path)
        finally:
            self.plain.unlink(missing_ok=True)
            self.packed.unlink(missing_ok=True)
