"""WORD: Whole abdominal ORgan Dataset."""

from data_curation.dataset import BELOW, NIFTI, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

CASE = rf"(?P<patient>word_\d{{4}}){NIFTI}"

DATASETS = (
    DataSet(
        name="word",
        title="WORD: Whole abdominal ORgan Dataset",
        licences=(
            Stated("academic research only, no commercial use", "the README of HiLab-git/WORD, for the data"),
            Stated("GPL-3.0", "the repository HiLab-git/WORD"),
        ),
        home_page="https://github.com/HiLab-git/WORD",
        doi="10.1016/j.media.2022.102642",
        citation="Luo X. et al., WORD: A large scale dataset, benchmark and clinical applicable study for abdominal "
        "organ segmentation from CT image, Medical Image Analysis 82, 102642 (2022)",
        tree="WORD-V0.1.0/imagesTr/word_*.nii.gz, WORD-V0.1.0/labelsTr/word_*.nii.gz, imagesVal, labelsVal, imagesTs, "
        "labelsTs",
        folder="WORD-V0.1.0",
        places=(
            Place(rf"{BELOW}images(Tr|Val)/{CASE}"),
            Place(rf"{BELOW}imagesTs/{CASE}", held_out=TEST_SET),
            Place(rf"{BELOW}labels(Tr|Val|Ts)/{CASE}", reason="label"),
        ),
        links=(Link("WORD-V0.1.0.zip (its password is in the README)", "https://github.com/HiLab-git/WORD"),),
        counts=Counts(train=120, test=30, slices=30_495, of=150),
        labels={
            1: "liver",
            2: "spleen",
            3: "left kidney",
            4: "right kidney",
            5: "stomach",
            6: "gallbladder",
            7: "oesophagus",
            8: "pancreas",
            9: "duodenum",
            10: "colon",
            11: "intestine",
            12: "adrenal glands",
            13: "rectum",
            14: "bladder",
            15: "head of left femur",
            16: "head of right femur",
        },
        overlaps=(
            ("abdomenatlas_1_0_mini", "the 120 training and validation scans; which is not published"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "values down to -3024 outside the field of view",
            "slices 2.5 to 3 mm apart, pixels about 0.98 mm",
        ),
    ),
)
