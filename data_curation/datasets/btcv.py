"""BTCV: Beyond the Cranial Vault, abdomen (MICCAI 2015)."""

from data_curation.dataset import BELOW, NIFTI, TEST_SET, Counts, DataSet, Link, Place, Stated

__all__ = ["DATASETS"]

DATASETS = (
    DataSet(
        name="btcv",
        title="BTCV: Multi-Atlas Labeling Beyond the Cranial Vault, abdomen",
        licences=(Stated("CC BY 4.0", "Synapse, syn3193805"),),
        commercial=True,
        redistribution=True,
        home_page="https://www.synapse.org/#!Synapse:syn3193805/wiki/217789",
        doi="10.7303/syn3193805",
        citation="Landman B. et al., Multi-Atlas Labeling Beyond the Cranial Vault (abdomen), MICCAI challenge (2015)",
        tree="RawData/Training/img/img0001.nii.gz, RawData/Training/label/label0001.nii.gz, ..., "
        "RawData/Testing/img/img0061.nii.gz, ...",
        folder="RawData",
        places=(
            Place(
                BELOW + r"RegData/.*",
                reason="outside_layout",
                detail="pairs of registered images, made from the scans in RawData: left out",
            ),
            Place(rf"{BELOW}Training/img/img(?P<patient>\d{{4}}){NIFTI}"),
            Place(rf"{BELOW}Testing/img/img(?P<patient>\d{{4}}){NIFTI}", held_out=TEST_SET),
            Place(rf"{BELOW}Training/label/label(?P<patient>\d{{4}}){NIFTI}", reason="label"),
        ),
        links=(Link("RawData.zip (abdomen)", "https://www.synapse.org/#!Synapse:syn3193805", registration=True),),
        counts=Counts(train=30, test=20, slices=3_700, of=30, about=True),
        train_ids=tuple(f"{n:04d}" for n in (*range(1, 11), *range(21, 41))),
        test_ids=tuple(f"{n:04d}" for n in range(61, 81)),
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
            10: "portal and splenic vein",
            11: "pancreas",
            12: "right adrenal gland",
            13: "left adrenal gland",
        },
        benchmark=True,
        overlaps=(
            ("abdomenatlas_1_0_mini", "47 of its 50 scans; which is not published"),
            ("abdomenatlas_1_1_mini", "as in 1.0"),
            ("abdomenatlas_3_0_mini", "as in 1.0"),
        ),
        quirks=(
            "slices 2.5 to 5 mm apart; HU from -1024 to 3071",
            "the same Synapse project offers CervixRawData.zip (pelvis) and RegData (registered pairs): not these",
            "mirrors rename the files; fetch the original",
        ),
    ),
)
