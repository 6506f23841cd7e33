"""AMOS: Abdominal Multi-Organ Segmentation (2022); the CT scans."""

from data_curation.dataset import BELOW, NIFTI, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

ANY = rf"(?P<patient>amos_\d{{4}}){NIFTI}"
MR = rf"(?P<patient>amos_(0(50[1-9]|5[1-9]\d|[6-9]\d\d)|[1-4]\d{{3}})){NIFTI}"  # 501 to 4999; CT is <= 500 or >= 5000
CORRUPT = "its file is damaged as given out"

DATASETS = (
    DataSet(
        name="amos22",
        title="AMOS22: Abdominal Multi-Organ Segmentation, CT scans",
        licences=(
            Stated("CC BY-NC-SA", "the paper and the challenge's page"),
            Stated("CC BY 4.0", "Zenodo, records 7155725 and 7262581"),
        ),
        redistribution=True,
        home_page="https://amos22.grand-challenge.org",
        doi="10.5281/zenodo.7155725",
        citation="Ji Y. et al., AMOS: A Large-Scale Abdominal Multi-Organ Benchmark for Versatile Medical Image "
        "Segmentation, NeurIPS Datasets and Benchmarks (2022)",
        tree="amos22/imagesTr/amos_0001.nii.gz, amos22/labelsTr/amos_0001.nii.gz, ..., imagesVa, labelsVa, imagesTs, "
        "and where fetched the unlabelled amos_5000.nii.gz to amos_6899.nii.gz",
        places=(
            Place(rf"{BELOW}labels(Tr|Va|Ts)/{ANY}", reason="label"),
            Place(BELOW + MR, reason="not_ct", detail="an MR scan, by its number (501 to 4999): left out"),
            Place(rf"{BELOW}imagesTs/{ANY}", held_out=TEST_SET),
            Place(rf"{BELOW}images(Tr|Va)/{ANY}"),
            Place(rf"{BELOW}(?P<patient>amos_[5-9]\d{{3}}){NIFTI}"),
        ),
        links=(
            Link("amos22.zip", "https://zenodo.org/records/7155725/files/amos22.zip"),
            Link("later record", "https://zenodo.org/records/7262581"),
        ),
        counts=Counts(train=300, test=200, slices=39_000, of=300, about=True),
        labels={
            1: "spleen",
            2: "right kidney",
            3: "left kidney",
            4: "gallbladder",
            5: "oesophagus",
            6: "liver",
            7: "stomach",
            8: "aorta",
            9: "inferior vena cava",
            10: "pancreas",
            11: "right adrenal gland",
            12: "left adrenal gland",
            13: "duodenum",
            14: "bladder",
            15: "prostate or uterus",
        },
        benchmark=True,
        known_bad={"amos_5437": CORRUPT, "amos_5514": CORRUPT},
        overlaps=(
            ("abdomenatlas_1_0_mini", "the 200 CT scans of the training part; which is not published"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "500 CT and 100 MR scans; a scan is CT if its number is 500 at most or 5000 at least",
            "1,900 more CT scans (5000 to 6899) come without labels, in archives of their own",
            "which numbers a whole download has is not listed here, so the validation fold is drawn over the labelled "
            "CT scans that are found: with a part of them it is another fold",
            "the archive holds a folder __MACOSX of files that are no scans",
            "some scans have 768 x 768 pixels",
        ),
    ),
)
