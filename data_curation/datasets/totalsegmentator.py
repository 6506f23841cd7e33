"""TotalSegmentator's CT data set, version 2."""

from data_curation.dataset import NIFTI, Counts, DataSet, Link, Place, SplitTable, Stated

__all__ = ["DATASETS"]

CASE = r"(?P<patient>s\d{4})"

DATASETS = (
    DataSet(
        name="totalsegmentator",
        title="TotalSegmentator CT dataset, version 2",
        licences=(Stated("CC BY 4.0", "Zenodo, record 10047292"),),
        commercial=True,
        redistribution=True,
        home_page="https://zenodo.org/records/10047292",
        doi="10.5281/zenodo.10047292",
        citation="Wasserthal J. et al., TotalSegmentator, Radiology: Artificial Intelligence 5(5), e230024 (2023)",
        tree="s0000/ct.nii.gz, s0000/segmentations/*.nii.gz, ..., meta.csv",
        folder="Totalsegmentator_dataset_v201",
        places=(
            Place(rf"{CASE}/ct{NIFTI}"),
            Place(rf"{CASE}/segmentations/[^/]+{NIFTI}", reason="label", structures=True),
        ),
        links=(
            Link(
                "Totalsegmentator_dataset_v201.zip",
                "https://zenodo.org/records/10047292/files/Totalsegmentator_dataset_v201.zip",
            ),
        ),
        counts=Counts(train=1139, test=89, slices=317_863, of=1228),
        split=SplitTable("meta.csv", ";", "image_id", "split", "test"),
        known_bad=dict.fromkeys(
            ("s0184", "s0224", "s0830", "s0864", "s0992"), "its HU are wrong in version 2.0.0 of the data set"
        ),
        quirks=(
            "117 structures, one file each; those of s0143, s0201 and s1196 are known to be wrong",
            "resampled to 1.5 mm; many scans are small fragments",
            "faces are blurred; s0001, s0044 and s0067 are rotated and have background in the corners",
            "tails from -9,000 to 11,000 HU",
            "version 1 (1,204 scans) and version 3 (1,939 scans) have other numbers of cases and other splits",
        ),
    ),
)
