"""The six CT tasks of the Medical Segmentation Decathlon."""

from __future__ import annotations

from collections.abc import Mapping

from data_curation.dataset import NIFTI, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

ATLAS = ("abdomenatlas_1_0_mini", "abdomenatlas_1_1_mini", "abdomenatlas_3_0_mini")
LITS = r"\d|[1-9]\d|1[0-2]\d|130"


def _task(
    name: str,
    number: int,
    end: str,
    labels: Mapping[int, str],
    counts: Counts,
    train_ids: tuple[str, ...] = (),
    same: tuple[tuple[str, str], ...] = (),
    overlaps: tuple[tuple[str, str], ...] = (),
    quirks: tuple[str, ...] = (),
) -> DataSet:
    folder, stem = f"Task{number:02d}_{end}", end.lower()
    image = rf"(?P<patient>{stem}_\d+){NIFTI}"
    return DataSet(
        name=name,
        title=f"Medical Segmentation Decathlon, task {number}: {end}",
        licences=(Stated("CC BY-SA 4.0", "the Decathlon's page"),),
        commercial=True,
        redistribution=True,
        home_page="http://medicaldecathlon.com",
        doi="10.1038/s41467-022-30695-9",
        citation="Antonelli M. et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022)",
        tree=f"{folder}/imagesTr/{stem}_*.nii.gz, {folder}/labelsTr/{stem}_*.nii.gz, {folder}/imagesTs/{stem}_*.nii.gz",
        folder=folder,
        places=(
            Place(rf"imagesTr/{image}"),
            Place(rf"imagesTs/{image}", held_out=TEST_SET),
            Place(rf"labelsTr/{image}", reason="label"),
        ),
        links=(Link(f"{folder}.tar", f"https://msd-for-monai.s3-us-west-2.amazonaws.com/{folder}.tar"),),
        counts=counts,
        train_ids=train_ids,
        labels=labels,
        same=same,
        overlaps=(*overlaps, *((atlas, f"the {counts.train} training scans") for atlas in ATLAS)),
        quirks=(*quirks, "beside every file the archive has one called ._ and its name, which is no scan"),
    )


SAME_HOSPITAL = "tasks 7 to 10 come from one hospital (MSKCC): a patient may be in several, which is not published"
DATASETS = (
    _task(
        "msd_liver",
        3,
        "Liver",
        {1: "liver", 2: "liver tumour"},
        Counts(train=131, test=70, slices=58_638, of=131),
        train_ids=tuple(f"liver_{n}" for n in range(131)),
        same=((rf"liver_({LITS})", r"lits/\1"),),
        overlaps=(
            ("lits", "the same 131 training scans under the same numbers, and the 70 test scans under others"),
            ("ct_org", "about 131 of its 140 scans, under other numbers"),
            ("abdomenct_1k", "all 201 scans"),
        ),
        quirks=(
            "has the spacing that LiTS itself has lost for 28 to 47",
            "LiTS gives out the same scans under CC BY-NC-ND 4.0; this copy comes under the Decathlon's licence",
        ),
    ),
    _task(
        "msd_lung",
        6,
        "Lung",
        {1: "lung tumour"},
        Counts(train=63, test=32, slices=18_000, of=63, about=True),
        quirks=(
            "its dataset.json says 64 training scans, there are 63",
            "from NSCLC Radiogenomics of The Cancer Imaging Archive, which other lung sets hold too",
        ),
    ),
    _task(
        "msd_pancreas",
        7,
        "Pancreas",
        {1: "pancreas", 2: "pancreatic tumour"},
        Counts(train=281, test=139, slices=26_719, of=281),
        overlaps=(("abdomenct_1k", "all 420 scans"),),
        quirks=(SAME_HOSPITAL,),
    ),
    _task(
        "msd_hepatic_vessel",
        8,
        "HepaticVessel",
        {1: "hepatic vessel", 2: "liver tumour"},
        Counts(train=303, test=140, slices=21_120, of=303),
        quirks=(SAME_HOSPITAL,),
    ),
    _task(
        "msd_spleen",
        9,
        "Spleen",
        {1: "spleen"},
        Counts(train=41, test=20, slices=3_600, of=41, about=True),
        overlaps=(("abdomenct_1k", "all 61 scans"),),
        quirks=(SAME_HOSPITAL,),
    ),
    _task(
        "msd_colon",
        10,
        "Colon",
        {1: "colon tumour"},
        Counts(train=126, test=64, slices=13_486, of=126),
        quirks=(SAME_HOSPITAL,),
    ),
)
