"""CT-ORG: six organs in CT and PET-CT, from The Cancer Imaging Archive."""

from data_curation.dataset import BELOW, NIFTI, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

HOME = "https://www.cancerimagingarchive.net/collection/ct-org/"

DATASETS = (
    DataSet(
        name="ct_org",
        title="CT-ORG: CT volumes with multiple organ segmentations",
        licences=(Stated("CC BY 3.0", "The Cancer Imaging Archive"),),
        commercial=True,
        redistribution=True,
        home_page=HOME,
        doi="10.7937/tcia.2019.tt7f4v7o",
        citation="Rister B. et al., CT-ORG, a new dataset for multiple organ segmentation in computed tomography, "
        "Scientific Data 7, 381 (2020)",
        tree="volume-0.nii.gz, labels-0.nii.gz, ... (mirrors: volumes/volume-0.nii.gz, labels/labels-0.nii.gz)",
        places=(
            Place(rf"{BELOW}volume-(?P<patient>1?\d|20){NIFTI}", held_out=TEST_SET),
            Place(rf"{BELOW}volume-(?P<patient>\d+){NIFTI}"),
            Place(rf"{BELOW}labels-(?P<patient>\d+){NIFTI}", reason="label"),
        ),
        links=(Link("CT-ORG, NIfTI", HOME),),
        counts=Counts(train=119, test=21, slices=63_503, of=140),
        train_ids=tuple(map(str, range(21, 140))),
        test_ids=tuple(map(str, range(21))),
        labels={1: "liver", 2: "bladder", 3: "lungs", 4: "kidney", 5: "bone", 6: "brain"},
        overlaps=(
            (
                "lits",
                "about 131 scans under other numbers, which is not published; the licence of LiTS is stricter",
            ),
            ("msd_liver", "about 131 scans under other numbers"),
            ("abdomenatlas_1_0_mini", "all 140 scans"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "files are called volume-N as in LiTS, and N means another scan",
            "about 9 scans are the CT of a PET-CT: low dose, with arms and head",
            "values from -4,008 to 14,420",
        ),
    ),
)
