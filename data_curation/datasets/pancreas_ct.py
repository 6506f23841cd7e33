"""NIH Pancreas-CT, from The Cancer Imaging Archive."""

from data_curation.dataset import BELOW, NIFTI, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

WITHDRAWN = "withdrawn by its authors on 2020-09-10 as a copy of PANCREAS_0002"
HOME = "https://www.cancerimagingarchive.net/collection/pancreas-ct/"

DATASETS = (
    DataSet(
        name="pancreas_ct",
        title="NIH Pancreas-CT",
        licences=(Stated("CC BY 3.0", "The Cancer Imaging Archive"),),
        commercial=True,
        redistribution=True,
        home_page=HOME,
        doi="10.7937/K9/TCIA.2016.tNB1kqBU",
        citation="Roth H. R. et al., Data From Pancreas-CT, The Cancer Imaging Archive (2016)",
        tree="Pancreas-CT/PANCREAS_0001/STUDY/SERIES/*.dcm, ..., TCIA_pancreas_labels-02-05-2017/label0001.nii.gz, ...",
        places=(
            Place(BELOW + r"PANCREAS_(?P<patient>\d{4})(/.*)?"),
            Place(rf"{BELOW}label(?P<patient>\d{{4}}){NIFTI}", reason="label"),
        ),
        links=(
            Link("Pancreas-CT, DICOM", HOME),
            Link("TCIA_pancreas_labels-02-05-2017.zip", HOME),
        ),
        counts=Counts(train=80, slices=18_942, of=80),
        train_ids=tuple(f"{n:04d}" for n in range(1, 83) if n not in (25, 70)),
        labels={1: "pancreas"},
        known_bad={"0025": WITHDRAWN, "0070": WITHDRAWN},
        overlaps=(
            ("abdomenct_1k", "all 80; which number is which is not published"),
            ("abdomenatlas_1_0_mini", "42, and 80 more by way of abdomenct_1k"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "rows of the DICOM files run from back to front (ImageOrientationPatient 1 0 0 0 -1 0): stacked as they "
            "are, they are mirrored against the label",
            "raw values from -2048 (padding) to 3071",
            "old copies and the archive of labels still hold 82 cases",
        ),
    ),
)
