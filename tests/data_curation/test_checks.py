"""What is CT, whole and usable, judged by values alone; the last word on the folder of real scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_curation.catalogue import cases
from data_curation.checks import Limits, Verdict, check, repair
from data_curation.volumes import Volume, VolumeError, read

LIMITS = Limits()


def ct(shape: tuple[int, int, int] = (8, 64, 64), seed: int = 0) -> np.ndarray:
    """Air, skin and fat around soft tissue with a bone and a lung in it, and noise."""
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.hypot(x * 1.1, y * 1.4)
    hu = np.full(shape, -1000.0)
    hu[radius < 0.9] = -100
    hu[radius < 0.75] = 50
    hu[np.hypot(x + 0.35, y) < 0.2] = -850
    hu[np.hypot(x, y - 0.3) < 0.1] = 700
    noise = np.random.default_rng(seed).normal(0, 15, shape)
    return np.rint(np.maximum(hu + noise, -1024)).astype(np.int16)


def volume(hu: np.ndarray, spacing: tuple[float, float, float] = (5.0, 3.0, 3.0)) -> Volume:
    return Volume(np.ascontiguousarray(hu.astype(np.int16)), spacing, "x.nii.gz")


def verdict(hu: np.ndarray, spacing: tuple[float, float, float] = (5.0, 3.0, 3.0), limits: Limits = LIMITS) -> Verdict:
    given = check(volume(hu, spacing), limits)
    assert given.detail
    assert given.kept == (given.reason == "")
    return given


def test_ct_is_kept() -> None:
    assert verdict(ct()).detail.startswith("8 slices of 64 x 64 pixels, 5 x 3 x 3 mm, -1024 to ")


def test_padding_of_any_depth_is_no_reason() -> None:
    for padding in (-1500, -2000, -2048, -3024, -32768):
        hu = ct()
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        hu[:, np.hypot(y, x) > 0.95] = padding
        assert verdict(hu).kept, padding


def test_metal_is_no_reason() -> None:
    hu = ct()
    hu[3, 30:33, 30:33] = 27572
    assert verdict(hu).kept


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def smooth(low: float, high: float, shape: tuple[int, int, int] = (8, 64, 64)) -> np.ndarray:
    """Broadly spread tissue on a dark background, as in MR."""
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    field = np.clip(1 - np.hypot(x, y), 0, None) + 0.1 * rng().random(shape)
    return np.rint(low + (high - low) * field / field.max()).astype(np.int16)


@pytest.mark.parametrize("top", [255, 1000, 1500, 2000, 3000, 4095, 30000])
def test_mr_and_pet_are_no_ct_whatever_their_scale(top: int) -> None:
    given = verdict(smooth(0, top))
    assert given.reason == "not_ct", given
    assert f"values from 0 to {top}" in given.detail
    assert verdict(smooth(-47, top)).reason == "not_ct"


def test_signed_phase_images_are_no_ct() -> None:
    assert verdict(rng().integers(-4096, 4096, (8, 64, 64))).reason == "not_ct"


def test_lost_offset_is_repaired_or_refused() -> None:
    raw = volume(ct() + 1024)
    given = check(raw, LIMITS)
    assert given.reason == "missing_offset"
    assert "limits.repair_offset=true" in given.detail
    mended = repair(raw, LIMITS)
    np.testing.assert_array_equal(mended.hu, ct())
    assert mended.notes == ("rescale intercept was missing: -1024 added to every voxel",)
    assert check(mended, LIMITS).kept
    assert repair(raw, Limits(repair_offset=False)) is raw


def test_repair_leaves_the_rest_alone() -> None:
    for hu in (ct(), *(smooth(0, top) for top in (255, 1500, 2000, 2500, 3000, 4095)), (ct() > 0)):
        given = volume(hu)
        assert repair(given, LIMITS) is given


@pytest.mark.parametrize(("low", "high"), [(-160, 240), (-250, 200), (-175, 250), (-500, 500), (-1024, 300)])
def test_window_levels_are_refused(low: int, high: int) -> None:
    given = verdict(np.clip(ct(), low, high))
    assert given.reason == "windowed", given
    assert "of the voxels are exactly" in given.detail


@pytest.mark.parametrize(("low", "high"), [(-1000, 32767), (-1024, 1000), (-1000, 1000)])
def test_wide_clipping_is_kept(low: int, high: int) -> None:
    assert verdict(np.clip(ct(), low, high)).kept


def test_labels_are_known_by_their_values() -> None:
    mask = ct() > 0
    assert verdict(mask).reason == "label"
    organs = np.kron(rng().integers(0, 118, (8, 8, 8)), np.ones((1, 8, 8), int))
    given = verdict(organs)
    assert given.reason == "label"
    assert "whole values from 0 to 117" in given.detail
    ignored = np.where(mask, -1, organs)
    assert verdict(ignored).reason == "label"
    dust = np.zeros((8, 64, 64))
    dust[:, ::9, ::9] = 1  # vessels a voxel wide: no neighbour is equal
    assert verdict(dust).reason == "label"


def test_eight_bit_pictures_are_no_labels() -> None:
    assert verdict(rng().integers(0, 256, (8, 64, 64))).reason == "not_ct"


@pytest.mark.parametrize("value", [0, -1024, -1000])
def test_empty_volumes(value: int) -> None:
    assert verdict(np.full((8, 64, 64), value)).reason == "constant"


def test_noise_in_air_is_no_body() -> None:
    given = verdict(rng().integers(-1024, -769, (4, 64, 64)))
    assert given.reason == "no_body"
    assert "0.00% of a slice is above -500 HU" in given.detail


def test_wrong_rescale_is_no_hu() -> None:
    assert verdict(ct() * 4 + 3000).reason == "not_ct"
    assert verdict(np.where(ct() < -900, -900, ct() + 900)).reason == "not_ct"


def test_sizes_and_spacings() -> None:
    assert verdict(ct()[:1]).reason == "single_slice"
    assert verdict(ct()[:2]).kept
    assert verdict(ct()[:2], limits=Limits(min_slices=3)).reason == "too_few_slices"
    assert verdict(ct((8, 64, 15))).reason == "too_small"
    assert verdict(ct((8, 64, 15)), limits=Limits(min_side=15)).kept
    assert verdict(ct(), (5, 0.01, 0.01)).reason == "spacing"
    assert verdict(ct(), (5, 9.0, 9.0)).reason == "spacing"
    assert verdict(ct(), (40.0, 1, 1)).reason == "spacing"
    assert verdict(ct(), (1, 1, 1)).kept


def test_identity_affine_of_full_size_scans_is_a_lost_spacing() -> None:
    hu = ct((3, 512, 512))
    given = verdict(hu, (1.0, 1.0, 1.0))
    assert given.reason == "unknown_spacing"
    assert verdict(hu, (1.0, 1.0, 1.0), Limits(unknown_spacing=True)).kept
    assert verdict(hu, (1.0, 0.7, 0.7)).kept


# ------------------------------------------------------------------------------------------- the folder of real scans

STS = ("001", "003", "006", "010", "012", "015", "019", "024", "032", "042")
KEPT = {
    "ts_example/ct.nii.gz": "",
    "ts_example/ct_sm.nii.gz": "",
    "ts_cta/aorta_ct.nii.gz": "",
    "ts_cta/pulmonary_ct.nii.gz": "",
    "lidc0001_chest/ct.nii.gz": "padding -2048",
    "slicer_ctchest4/CTChest4.nrrd": "padding -3024",
    "elastix_lung/3DCT_lung.mha": "",
    "elastix_lung/3DCT_lung_baseline_small.mha": "",
    "lst_nodule/PartSolidLesionCropped.mha": "",
    "tptbox_spine/sub-ct_label-22_ct.nii.gz": "",
    "innereye_thorax/scan_small.nii.gz": "",
    **{f"sts_gtv/STS_{number}/CT_image.nii.gz": "" for number in STS},
    "sts_002_multimodal/CT_dicom": "",
    "sts_002_multimodal/CT_image.nii.gz": "",
    "ge_head_tilt_dicom": "gantry tilt 18.5 degrees",
    "edge_cases/dicom_seg_3slice/ct": "padding -3024",
    "edge_cases/tiny16_axial_dicom": "",
}
REFUSED = {
    "sts_002_multimodal/MR_T1_image.nii.gz": "not_ct",
    "sts_002_multimodal/PET_image.nii.gz": "not_ct",
    "edge_cases/mr_mixed_in/mr.nii.gz": "not_ct",
    "edge_cases/mr_dicom_4slices": "not_ct",
    "edge_cases/not_hu/CT_pitch_phantom_uint8.nii.gz": "not_ct",
    "edge_cases/gantrytilt_noise_dicom": "no_body",
    "edge_cases/irregular_spacing_noise_dicom": "no_body",
    "edge_cases/same_position_noise_dicom": "not_a_volume",
    "edge_cases/tiny16_scout_two_views_dicom": "localizer",
    "edge_cases/tiny16_gap_in_series_dicom": "not_a_volume",
    "edge_cases/single_slice_128/CT_small.dcm": "single_slice",
    "edge_cases/enhanced_ct_perfusion_map/eCT_Supplemental.dcm": "derived",
    "edge_cases/phantom_localizer_and_screens/IM1.dcm": "localizer",
    "edge_cases/phantom_localizer_and_screens/IM2.dcm": "screen_save",
    "edge_cases/dicom_seg_3slice/liver.dcm": "not_image",
    "edge_cases/dicom_seg_3slice/partial_overlaps.dcm": "not_image",
    "sts_002_multimodal/CT_rtstruct/RS.dcm": "not_image",
    "*.csv": "not_image",
    "*.json": "not_image",
    "*.md": "not_image",
    "*.tsv": "not_image",
    "*.txt": "not_image",
}
LABELS = (
    "ts_example/ct_seg.nii.gz",
    "ts_example/ct_sm_seg.nii.gz",
    "ts_cta/aorta_seg.nii.gz",
    "ts_cta/aorta_true_false_lumen.nii.gz",
    "ts_cta/heart_mask_other_grid.nii.gz",
    "ts_cta/pulmonary_artery_mask.nii.gz",
    "lidc0001_chest/seg.nii.gz",
    "slicer_ctchest4/Segmentation.seg.nrrd",
    "slicer_ctchest4/SegmentationOverlapping.seg.nrrd",
    "elastix_lung/3DCT_lung_mask.mha",
    "tptbox_spine/sub-ct_seg-subreg_label-22_msk.nii.gz",
    "tptbox_spine/sub-ct_seg-vert_label-22_msk.nii.gz",
    *(f"sts_gtv/STS_{number}/CT_mask.nii.gz" for number in STS),
    "sts_002_multimodal/CT_mask.nii.gz",
    "sts_002_multimodal/MR_T1_mask.nii.gz",
    "sts_002_multimodal/PET_mask.nii.gz",
    "edge_cases/mr_mixed_in/mr_seg.nii.gz",
)


def test_every_file_of_the_real_folder(real_ct: Path) -> None:
    found, refused = cases("folder", real_ct)
    reasons = {source: reason for source, reason, _ in refused}
    assert len(reasons) == len(refused)
    details = [detail for _, _, detail in refused]
    notes: dict[str, str] = {}
    for case in found:
        try:
            scan = repair(read(case.image), LIMITS)
        except VolumeError as error:
            reasons[case.source] = error.reason
            details.append(str(error))
            continue
        given = check(scan, LIMITS)
        details.append(given.detail)
        if given.kept:
            notes[case.source] = "; ".join(scan.notes)
        else:
            reasons[case.source] = given.reason
    assert reasons == REFUSED | dict.fromkeys(LABELS, "label")
    assert set(notes) == set(KEPT)
    for source, words in KEPT.items():
        assert words in notes[source]
    assert all(len(detail) > 20 for detail in details)


def test_the_manifest_is_covered(real_ct: Path) -> None:
    rows = (real_ct / "MANIFEST.tsv").read_text().splitlines()[1:]
    known = KEPT.keys() | REFUSED.keys() | set(LABELS)
    for path in (row.split("\t")[0] for row in rows):
        assert any(source == path or source.startswith(path + "/") for source in known), path


def test_dicom_and_its_nifti_twin_are_equal(real_ct: Path) -> None:
    found, _ = cases("folder", real_ct / "sts_002_multimodal")
    scans = {
        case.source: read(case.image) for case in found if case.source.startswith("CT_image") or "dicom" in case.source
    }
    dicom, nifti = scans["CT_dicom"], scans["CT_image.nii.gz"]
    np.testing.assert_array_equal(dicom.hu, nifti.hu)
    assert dicom.spacing == pytest.approx(nifti.spacing, rel=1e-3)


def test_the_uneven_tilted_head_says_so(real_ct: Path) -> None:
    (case,), _ = cases("folder", real_ct / "ge_head_tilt_dicom")
    scan = read(case.image)
    assert scan.spacing[0] == pytest.approx(4.0, abs=0.01)
    assert any("uneven slice spacing 1.08 to 7.00 mm" in note for note in scan.notes)
