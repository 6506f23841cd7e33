"""CHAOS: Combined Healthy Abdominal Organ Segmentation; the CT arm."""

from data_curation.dataset import BELOW, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

TRAIN = (1, 2, 5, 6, 8, 10, 14, 16, 18, 19, *range(21, 31))

DATASETS = (
    DataSet(
        name="chaos",
        title="CHAOS: Combined Healthy Abdominal Organ Segmentation, CT arm",
        licences=(
            Stated("CC BY-NC-SA 4.0", "Zenodo, record 3431873"),
            Stated("CC BY-SA 4.0", "the list of sources of AbdomenAtlas"),
        ),
        redistribution=True,
        home_page="https://chaos.grand-challenge.org",
        doi="10.5281/zenodo.3362844",
        citation="Kavur A. E. et al., CHAOS Challenge, Medical Image Analysis 69, 101950 (2021)",
        tree="Train_Sets/CT/1/DICOM_anon/*.dcm, Train_Sets/CT/1/Ground/*.png, ..., Test_Sets/CT/3/DICOM_anon/*.dcm",
        places=(
            Place(BELOW + r"Train_Sets/CT/(?P<patient>\d+)/DICOM_anon", label=("/DICOM_anon$", "/Ground")),
            Place(BELOW + r"Test_Sets/CT/(?P<patient>\d+)/DICOM_anon", held_out=TEST_SET),
            Place(BELOW + r"(Train|Test)_Sets/MR/.*", reason="not_ct", detail="the MR arm of the data set: left out"),
        ),
        links=(
            Link("CHAOS_Train_Sets.zip", "https://zenodo.org/records/3431873/files/CHAOS_Train_Sets.zip"),
            Link("CHAOS_Test_Sets.zip", "https://zenodo.org/records/3431873/files/CHAOS_Test_Sets.zip"),
        ),
        counts=Counts(train=20, test=20, slices=3_000, of=20, about=True),
        train_ids=tuple(map(str, TRAIN)),
        test_ids=tuple(str(n) for n in range(1, 41) if n not in TRAIN),
        labels={1: "liver"},
        overlaps=(
            ("abdomenatlas_1_0_mini", "20 scans; which is not published"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "labels are PNG files (255 is liver) whose order and flip need not be those of the DICOM files",
            "healthy donors, portal phase",
        ),
    ),
)
