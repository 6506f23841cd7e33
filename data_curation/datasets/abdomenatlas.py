"""AbdomenAtlas 1.0, 1.1 and 3.0 Mini: older public collections under numbers of its own, with many organs labelled."""

from __future__ import annotations

from collections.abc import Mapping

from data_curation.dataset import BELOW, NIFTI, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

CASE = r"(?P<patient>BDMAP_\d{8})"
NINE = (
    "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "inferior vena cava", "spleen",
    "stomach",
)  # fmt: skip
TWENTY_FIVE = (
    *NINE, "left adrenal gland", "right adrenal gland", "bladder", "coeliac trunk", "colon", "duodenum", "oesophagus",
    "left femur", "right femur", "hepatic vessel", "intestine", "left lung", "right lung", "portal and splenic vein",
    "prostate", "rectum",
)  # fmt: skip
EIGHT_K = (
    "Qu C. et al., AbdomenAtlas-8K: Annotating 8,000 CT Volumes for Multi-Organ Segmentation in Three Weeks, "
    "NeurIPS (2023)"
)
ATLAS = (
    "Li W. et al., AbdomenAtlas: A large-scale, detailed-annotated, & multi-center dataset for efficient transfer "
    "learning and open algorithmic benchmarking, Medical Image Analysis 97, 103285 (2024)"
)
RADGPT = "Bassi P. R. A. S. et al., RadGPT: Constructing 3D Image-Text Tumor Datasets, arXiv:2501.04678 (2025)"
SOURCES = (
    ("btcv", "47"),
    ("pancreas_ct", "42, and 80 by way of abdomenct_1k"),
    ("chaos", "20"),
    ("lits", "131, most of them twice or more"),
    ("kits23", "300, and again by way of abdomenct_1k"),
    ("word", "120"),
    ("abdomenct_1k", "1,000"),
    ("amos22", "200 of the training part"),
    ("msd_liver", "131"),
    ("msd_lung", "63"),
    ("msd_pancreas", "281"),
    ("msd_hepatic_vessel", "303"),
    ("msd_spleen", "41"),
    ("msd_colon", "126"),
    ("ct_org", "140"),
)


def _release(
    number: str,
    tree: str,
    counts: Counts,
    doi: str,
    citation: str,
    size: str = "",
    labels: Mapping[int, str] | None = None,
    quirks: tuple[str, ...] = (),
) -> DataSet:
    """The sources name the scans alike in all three, so each entry is tied to 3.0, which holds them all."""
    name, hub = f"abdomenatlas_{number.replace('.', '_')}_mini", f"AbdomenAtlas{number}Mini"
    newest = "abdomenatlas_3_0_mini"
    return DataSet(
        name=name,
        title=f"AbdomenAtlas {number} Mini",
        licences=(
            Stated(
                "CC BY-NC-SA 4.0 and terms of its sources",
                "its sources, such as FLARE'23 (CC BY-NC-ND 4.0) and RSNA (non-commercial)",
            ),
            Stated("CC BY-NC-SA 4.0", "the Hugging Face page"),
        ),
        home_page=f"https://huggingface.co/datasets/AbdomenAtlas/{hub}",
        doi=doi,
        citation=citation,
        tree=tree,
        places=(
            Place(rf"{BELOW}{CASE}/ct{NIFTI}"),
            Place(rf"{BELOW}{CASE}/combined_labels{NIFTI}", reason="label"),
            Place(rf"{BELOW}{CASE}/segmentations/[^/]+{NIFTI}", reason="label", structures=True),
        ),
        links=(Link(hub, f"https://huggingface.co/datasets/AbdomenAtlas/{hub}", size),),
        counts=counts,
        train_ids=tuple(f"BDMAP_{n:08d}" for n in range(1, counts.train + 1)),
        labels=labels,
        same=() if name == newest else ((r"BDMAP_\d{8}", rf"{newest}/\g<0>"),),
        overlaps=SOURCES,
        quirks=(
            "which number comes from which source is not published",
            "5,195 scans come from public collections: those listed, FLARE'23 (2,200) and AbdomenCT-12organ (50)",
            "shape and spacing are those of the source; some volumes have few rows, one has 2,572 slices",
            *quirks,
        ),
    )


DATASETS = (
    _release(
        "1.0",
        "BDMAP_00000001/ct.nii.gz, BDMAP_00000001/combined_labels.nii.gz, BDMAP_00000001/segmentations/*.nii.gz, ...",
        Counts(train=5195, slices=1_638_917, of=5170),
        "10.48550/arXiv.2305.09666",
        EIGHT_K,
        size="340 GB",
        labels=dict(enumerate(NINE, 1)),
    ),
    _release(
        "1.1",
        "BDMAP_00000001/ct.nii.gz, BDMAP_00000001/combined_labels.nii.gz, BDMAP_00000001/segmentations/*.nii.gz, ... "
        "at any depth",
        Counts(train=5195, slices=1_638_917, of=5170),
        "10.1016/j.media.2024.103285",
        ATLAS,
        labels=dict(enumerate(TWENTY_FIVE, 1)),
        quirks=(
            "has labels of 9,262 scans and images of the first 5,195; the rest is the RSNA abdominal trauma set",
            "its two last archives are nested one folder deeper",
        ),
    ),
    _release(
        "3.0",
        "image_only/BDMAP_00000001/ct.nii.gz, mask_only/BDMAP_00000001/segmentations/*.nii.gz, ...",
        Counts(train=9262, slices=2_700_000, of=9262, about=True),
        "10.48550/arXiv.2501.04678",
        RADGPT,
        size="about 500 GB",
        quirks=(
            "5196 to 9262 are the RSNA abdominal trauma set of 2023",
            "comes with reports and tumour counts (AbdomenAtlas3.0MiniWithMeta.csv) and lists of test cases "
            "(TrainTestIDS): neither is read, so no case is held out by them",
        ),
    ),
)
