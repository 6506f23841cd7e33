"""AbdomenCT-1K, a collection of older collections with labels of four organs."""

from data_curation.dataset import BELOW, NIFTI, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

BOGUS = (78, 273, 274, 275, 276, 277, 278, *range(280, 287), 462, 574, 575, 576, 577, 578)

DATASETS = (
    DataSet(
        name="abdomenct_1k",
        title="AbdomenCT-1K",
        licences=(
            Stated("CC BY-NC-SA", "the paper's table of data sets"),
            Stated("CC BY 4.0", "Zenodo, record 5903099"),
        ),
        redistribution=True,
        home_page="https://github.com/JunMa11/AbdomenCT-1K",
        doi="10.1109/TPAMI.2021.3100536",
        citation="Ma J. et al., AbdomenCT-1K: Is Abdominal Organ Segmentation a Solved Problem?, IEEE Transactions on "
        "Pattern Analysis and Machine Intelligence 44(10), 6695-6714 (2022)",
        tree="AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz, ..., AbdomenCT-1K-ImagePart3/Case_*_0000.nii.gz, "
        "Mask/Case_00001.nii.gz, ...",
        places=(
            Place(rf"{BELOW}(?P<patient>Case_\d{{5}})_0000{NIFTI}"),
            Place(rf"{BELOW}(?P<patient>Case_\d{{5}}){NIFTI}", reason="label"),
        ),
        links=(
            Link("image part 1", "https://zenodo.org/records/5903099"),
            Link("image part 2", "https://zenodo.org/records/5903846"),
            Link("image part 3 and Mask.7z", "https://zenodo.org/records/5903769"),
        ),
        counts=Counts(train=1062, slices=201_528, of=1000),
        train_ids=tuple(f"Case_{n:05d}" for n in range(1, 1063)),
        labels={1: "liver", 2: "kidney", 3: "spleen", 4: "pancreas"},
        bogus_spacing=frozenset(f"Case_{n:05d}" for n in BOGUS),
        same=((r"Case_00(297|928)", "lits/74"),),
        overlaps=(
            ("lits", "all 201 scans"),
            ("kits23", "the 300 cases of 2019"),
            ("msd_spleen", "all 61 scans"),
            ("msd_pancreas", "all 420 scans"),
            ("pancreas_ct", "all 80 scans"),
            ("abdomenatlas_1_0_mini", "1,000 scans"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "which scan comes from where is not published; Case_00297 and Case_00928 are both LiTS 74",
            "1,062 scans, of which 1,000 have labels",
            "20 scans have lost their spacing and say 1 x 1 x 1 mm (3D-IRCADb-1, by way of LiTS)",
            "one volume has 79 voxels of 3 mm along its second axis: its slices do not lie along the third",
        ),
    ),
)
