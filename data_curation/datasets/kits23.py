"""KiTS: the Kidney and Kidney Tumor Segmentation challenge of 2023, whose cases contain those of 2019 and 2021."""

from data_curation.dataset import BELOW, NIFTI, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

CASE = r"(?P<patient>case_\d{5})"

DATASETS = (
    DataSet(
        name="kits23",
        title="KiTS23: Kidney and Kidney Tumor Segmentation Challenge (reads KiTS19 and KiTS21 too)",
        licences=(
            Stated("CC BY-NC-SA 4.0", "the challenge"),
            Stated("CC BY 3.0", "The Cancer Imaging Archive, for C4KC-KiTS, its copy of the cases of 2019"),
        ),
        redistribution=True,
        home_page="https://kits-challenge.org/kits23/",
        doi="10.48550/arXiv.2307.01984",
        citation="Heller N. et al., The KiTS21 Challenge: Automatic segmentation of kidneys, renal tumors, and renal "
        "cysts in corticomedullary-phase CT, arXiv:2307.01984 (2023)",
        tree="dataset/case_00000/imaging.nii.gz, dataset/case_00000/segmentation.nii.gz, ... (KiTS21: kits21/data/"
        "case_00000/imaging.nii.gz, aggregated_MAJ_seg.nii.gz; KiTS19: data/case_00000/...)",
        places=(
            Place(rf"{BELOW}{CASE}/imaging{NIFTI}"),
            Place(rf"{BELOW}images/{CASE}{NIFTI}"),
            Place(rf"{BELOW}{CASE}/segmentation{NIFTI}", reason="label"),
            Place(rf"{BELOW}{CASE}/aggregated_MAJ_seg{NIFTI}", reason="label"),
            Place(rf"{BELOW}{CASE}/aggregated_(AND|OR)_seg{NIFTI}", reason="label"),
            Place(rf"{BELOW}{CASE}/(instances|segmentations)/.+{NIFTI}", reason="label", structures=True),
        ),
        links=(
            Link("labels, and a script that fetches the images", "https://github.com/neheller/kits23"),
            Link("images", "https://huggingface.co/datasets/neheller/KiTS-Challenge-Imaging"),
        ),
        counts=Counts(train=489, slices=95_221, of=489),
        train_ids=tuple(f"case_{n:05d}" for n in (*range(300), *range(400, 589))),
        labels={1: "kidney", 2: "kidney tumour", 3: "kidney cyst"},
        benchmark=True,
        overlaps=(
            ("abdomenct_1k", "the 300 cases of 2019; which number is which is not published"),
            ("abdomenatlas_1_0_mini", "300, and again by way of abdomenct_1k"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "slices lie along the first stored axis, not the last, and the affine says so: never guess the axis",
            "there are no numbers 300 to 399; the 110 test cases are not given out",
            "KiTS19 labels the first 210 cases only",
            "slices 0.5 to 5 mm apart; one volume has 512 x 796 pixels",
        ),
    ),
)
