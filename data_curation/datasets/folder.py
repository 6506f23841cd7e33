"""Any folder of CT images, for what the catalogue does not know."""

from data_curation.dataset import DataSet, Place, Stated

__all__ = ["DATASETS"]

DATASETS = (
    DataSet(
        name="folder",
        title="Any folder of CT images",
        licences=(Stated("unknown", "nobody has said: state it with `licence:`"),),
        home_page="",
        doi="",
        citation="",
        tree="patient/scan.nii.gz, patient/series/*.dcm, *.nrrd, *.mha, ... at any depth",
        places=(Place(r".*"),),
        quirks=(
            "a patient is a DICOM PatientID, else the first folder not called images, train or the like, else the file",
        ),
        anything=True,
    ),
)
