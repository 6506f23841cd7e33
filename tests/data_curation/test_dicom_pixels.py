"""Every way in which DICOM stores pixels gives the same HU; what is not read is refused by name."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate, generate_frames

from data_curation import dicom
from data_curation.volumes import VolumeError, find
from tests.data_curation.test_dicom import SIZE, expected, refused, slice_at, volume, write

PLACES = (0, 2, 4)
HTJ2K = "1.2.840.10008.1.2.4.201"
REVERSIBLE = {"codecformat": "j2k", "reversible": True, "level": 0}
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    uid.JPEGLosslessSV1: ("ljpeg", {}),
    uid.JPEGLossless: ("ljpeg", {}),
    uid.JPEGLSLossless: ("jpegls", {}),
    uid.JPEG2000Lossless: ("jpeg2k", REVERSIBLE),
    uid.JPEG2000: ("jpeg2k", REVERSIBLE),
    HTJ2K: ("htj2k", {}),
    "1.2.840.10008.1.2.4.203": ("htj2k", {}),
}


def compressed(data: FileDataset, syntax: str, dtype: Any = np.uint16, lost: int = 0) -> FileDataset:
    codec, options = CODECS[syntax]
    stored = np.frombuffer(data.PixelData, dtype).reshape(SIZE, SIZE)
    part = getattr(imagecodecs, f"{codec}_encode")(stored, **options)
    data.PixelData = encapsulate([part[: len(part) - lost]])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = syntax
    return data


@pytest.mark.parametrize("syntax", CODECS, ids=lambda syntax: uid.UID(syntax).name)
@pytest.mark.parametrize("signed", [0, 1])
def test_compressed_syntaxes(tmp_path: Path, syntax: str, signed: int) -> None:
    """Negative numbers go in as the 16 bits that they are: JPEG and JPEG-LS know no sign."""
    intercept = 0 if signed else -1024
    slices = [slice_at(z, PixelRepresentation=signed, RescaleIntercept=intercept) for z in PLACES]
    made = [compressed(data, syntax) for data in slices]
    np.testing.assert_array_equal(volume(write(tmp_path, *made)).hu, expected(*PLACES))


@pytest.mark.parametrize("signed", [0, 1])
def test_signed_streams(tmp_path: Path, signed: int) -> None:
    """JPEG 2000 has a sign of its own, which some writers set at odds with the header."""
    slices = [slice_at(z, PixelRepresentation=signed, RescaleIntercept=0 if signed else -1024) for z in PLACES]
    made = [compressed(data, uid.JPEG2000Lossless, np.int16) for data in slices]
    np.testing.assert_array_equal(volume(write(tmp_path, *made)).hu, expected(*PLACES))


def test_run_length_and_deflated_files(tmp_path: Path) -> None:
    slices = [slice_at(z) for z in PLACES]
    for data in slices:
        data.compress(uid.RLELossless)
    np.testing.assert_array_equal(volume(write(tmp_path / "rle", *slices)).hu, expected(*PLACES))
    deflated = [slice_at(z, syntax="1.2.840.10008.1.2.1.99") for z in PLACES]
    np.testing.assert_array_equal(volume(write(tmp_path / "deflated", *deflated)).hu, expected(*PLACES))


def test_big_endian(tmp_path: Path) -> None:
    for z in PLACES:
        data = slice_at(z, syntax=uid.ExplicitVRBigEndian)
        data.PixelData = np.frombuffer(data.PixelData, np.int16).astype(">i2").tobytes()
        pydicom.dcmwrite(tmp_path / f"{z}.dcm", data, implicit_vr=False, little_endian=False, enforce_file_format=True)
    np.testing.assert_array_equal(volume(tmp_path).hu, expected(*PLACES))


def test_lossy_jpeg_is_kept_and_told(tmp_path: Path) -> None:
    slices = []
    for z in PLACES:
        data = slice_at(z, PixelRepresentation=0, BitsStored=12, HighBit=11)
        stored = np.frombuffer(data.PixelData, np.uint16).reshape(SIZE, SIZE)
        data.PixelData = encapsulate([imagecodecs.jpeg8_encode(stored, level=100, bitspersample=12)])
        data["PixelData"].VR = "OB"
        data.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
        slices.append(data)
    result = volume(write(tmp_path, *slices))
    assert np.abs(result.hu - expected(*PLACES)).max() <= 3
    assert result.notes == ("3 of 3 slices were compressed with loss",)
    flagged = [slice_at(z, LossyImageCompression="01") for z in PLACES]
    assert volume(write(tmp_path / "flag", *flagged)).notes == ("3 of 3 slices were compressed with loss",)


@pytest.mark.parametrize(
    "syntax", [uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless, "1.2.840.10008.1.2.4.201"]
)
def test_compressed_pixels_that_lack_their_end(tmp_path: Path, syntax: str) -> None:
    """Some decoders make up what is missing without a word."""
    slices = [slice_at(z, PixelRepresentation=0) for z in PLACES]
    folder = write(tmp_path, *(compressed(data, syntax, lost=40) for data in slices))
    assert "0.dcm are cut short or damaged" in refused(folder, "truncated")


def test_files_that_end_inside_a_fragment_are_set_apart(tmp_path: Path) -> None:
    folder = write(tmp_path, *(compressed(slice_at(z, PixelRepresentation=0), uid.JPEGLSLossless) for z in PLACES))
    whole = (folder / "1.dcm").read_bytes()
    (folder / "1.dcm").write_bytes(whole[:-60])
    assert {found.source: found.reason for found in find(folder)} == {"1.dcm": "unreadable", "0.dcm": ""}


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    video = [slice_at(z, syntax=uid.MPEG2MPML, PixelData=encapsulate([b"video" * 8])) for z in PLACES]
    (found,) = find(write(tmp_path / "video", *video))
    assert found.reason == "unsupported"
    assert "MPEG2" in found.detail
    assert "convert the files" in found.detail
    tables = []
    for z in PLACES:
        table = slice_at(z)
        item = pydicom.Dataset()
        item.LUTDescriptor, item.LUTData, item.ModalityLUTType = [2, 0, 16], [0, 1], "HU"
        item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
        table.ModalityLUTSequence = [item]
        tables.append(table)
    assert "lookup table" in refused(write(tmp_path / "table", *tables), "lookup_table")
    maps = [slice_at(z, RescaleType="Z_EFF") for z in PLACES]
    assert "an atomic number map" in refused(write(tmp_path / "maps", *maps), "derived")


@settings(max_examples=60, deadline=None)
@given(
    stored=st.integers(8, 16),
    spare=st.integers(0, 4),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_bits_beyond_the_stored_ones_are_left_out(
    tmp_path_factory: pytest.TempPathFactory, stored: int, spare: int, signed: bool, seed: int
) -> None:
    """Old overlays lie above the high bit, rubbish may lie below the lowest."""
    high = min(15, stored - 1 + spare)
    draw = np.random.default_rng(seed)
    low = -(1 << (stored - 1)) if signed else 0
    numbers = draw.integers(low, low + (1 << stored), (3, SIZE, SIZE))
    down = high + 1 - stored
    mask = ((1 << stored) - 1) << down
    words = ((numbers << down) & mask) | (draw.integers(0, 1 << 16, numbers.shape) & ~mask & 0xFFFF)
    slices = []
    for index, word in enumerate(words):
        form = {"BitsStored": stored, "HighBit": high, "PixelRepresentation": int(signed)}
        data = slice_at(2 * index, RescaleIntercept=-100, **form)
        data.PixelData = word.astype(np.uint16).tobytes()
        slices.append(data)
    folder = write(tmp_path_factory.mktemp("bits"), *slices)
    grid = dicom.load(sorted(folder.iterdir()))
    np.testing.assert_array_equal(grid.voxels, numbers - 100)


def test_wide_numbers_widen_the_stack(tmp_path: Path) -> None:
    slices = [slice_at(z) for z in PLACES]
    slices[1].RescaleIntercept = 40000
    grid = dicom.load(sorted(write(tmp_path / "wide", *slices).iterdir()))
    assert grid.voxels.dtype == np.int32
    np.testing.assert_array_equal(grid.voxels[1], expected(2)[0].astype(int) + 41024)
    np.testing.assert_array_equal(grid.voxels[::2], expected(0, 4))
    slices[2].RescaleSlope = 0.5
    grid = dicom.load(sorted(write(tmp_path / "float", *slices).iterdir()))
    assert grid.voxels.dtype == np.float32
    np.testing.assert_allclose(grid.voxels[2], (expected(4)[0] + 1024.0) / 2 - 1024)


def test_declared_padding_is_known_with_its_range(tmp_path: Path) -> None:
    slices = []
    for z in PLACES:
        hu = expected(z)[0]
        hu[:5], hu[5:8] = -2990, -3024
        slices.append(slice_at(z, hu=hu, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1950))
    result = volume(write(tmp_path, *slices))
    assert result.padding == (-3024, -2974)
    assert result.notes == ("padding -3024 to -2974 on 20.0% of the voxels kept",)


def test_real_files_hold_what_gdcm_reads(real_ct: Path) -> None:
    """The other reader of the field, on every CT slice of the folder."""
    compared = 0
    for found in find(real_ct):
        if found.kind != "dicom" or found.reason:
            continue
        grid = dicom.load(found.files, found.frames)
        for array, path in zip(grid.voxels, found.files, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
            np.testing.assert_array_equal(array, sitk.GetArrayViewFromImage(image)[0])
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("syntax", [*CODECS, uid.RLELossless], ids=lambda syntax: uid.UID(syntax).name)
def test_damaged_streams_are_refused_or_read_but_never_more(tmp_path: Path, syntax: str) -> None:
    """Decoders have crashed, looped and asked for gigabytes on such bytes."""
    data = slice_at(0, PixelRepresentation=0)
    if syntax == uid.RLELossless:
        data.compress(syntax)
    else:
        compressed(data, syntax)
    (part,) = generate_frames(data.PixelData, number_of_frames=1)
    draw = np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(part)
        for at in draw.integers(0, len(part) if number % 2 else 60, 2):
            damaged[at] = int(draw.integers(0, 256))
        data.PixelData = encapsulate([bytes(damaged[: draw.integers(4, len(part))] if number % 5 == 0 else damaged)])
        write(tmp_path, data, slice_at(2))
        with suppress(VolumeError):
            dicom.load([tmp_path / "0.dcm", tmp_path / "1.dcm"])
