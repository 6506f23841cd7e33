"""LiTS: the Liver Tumor Segmentation Benchmark."""

from data_curation.dataset import BELOW, NIFTI, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

NUMBER = r"(?P<patient>\d|[1-9]\d|1[0-2]\d|130)"  # CT-ORG has volumes 0 to 139, under other numbers

DATASETS = (
    DataSet(
        name="lits",
        title="LiTS: Liver Tumor Segmentation Benchmark",
        licences=(
            Stated("CC BY-NC-ND 4.0", "CodaLab, competition 17094"),
            Stated("CC BY-SA 4.0", "the Medical Segmentation Decathlon, for its copy of the scans"),
        ),
        home_page="https://competitions.codalab.org/competitions/17094",
        doi="10.1016/j.media.2022.102680",
        citation="Bilic P. et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84 (2023)",
        tree="Training Batch 1/volume-0.nii, Training Batch 1/segmentation-0.nii, ..., "
        "Training Batch 2/volume-28.nii, ..., test-volume-0.nii, ...",
        places=(
            Place(rf"{BELOW}volume-{NUMBER}{NIFTI}"),
            Place(rf"{BELOW}(?P<patient>test-volume-\d+){NIFTI}", held_out=TEST_SET),
            Place(rf"{BELOW}segmentation-{NUMBER}{NIFTI}", reason="label"),
        ),
        links=(
            Link(
                "Training Batch 1, Training Batch 2, test data",
                "https://competitions.codalab.org/competitions/17094",
                registration=True,
            ),
        ),
        counts=Counts(train=131, test=70, slices=58_638, of=131),
        train_ids=tuple(map(str, range(131))),
        test_ids=tuple(f"test-volume-{n}" for n in range(70)),
        labels={1: "liver", 2: "liver tumour"},
        benchmark=True,
        bogus_spacing=frozenset(map(str, range(28, 48))),
        overlaps=(
            ("msd_liver", "the same 131 training scans under the same numbers, and the 70 test scans"),
            ("ct_org", "about 131 of its 140 scans, under other numbers"),
            ("abdomenct_1k", "all 201; of the numbers only LiTS 74 = Case_00297 = Case_00928 is known"),
            ("abdomenatlas_1_0_mini", "131, and again by way of msd_liver and abdomenct_1k"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "28 to 47 (3D-IRCADb-1) have lost their header: identity affine, 1 x 1 x 1 mm; msd_liver has the true one",
            "the axes of the voxels differ between cases: table up or down, left and right exchanged",
            "values from -10,522 to 27,572",
            "no tumour in 32, 34, 38, 41, 47, 87, 89, 91, 105, 106, 114, 115, 119",
        ),
    ),
)
