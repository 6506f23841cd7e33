"""Phantom trees in every layout become corpora with the expected counts, alone and all together, without a leak."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_curation.catalogue import CATALOGUE, cases
from data_curation.curate import Settings
from data_curation.index import read_index
from data_curation.proofs import proofs
from data_curation.verify import verify
from tests.data_curation.curated import main
from tests.data_curation.test_catalogue_entries import TREES, grow

SHAPE, SPACING = (8, 64, 64), (22.0, 6.0, 6.0)
LOST = {"unknown_spacing": True}  # the phantoms of lost headers say 1 mm, and are smaller than 512 pixels anyway


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tree of phantoms for every entry. The case of number n shows the same patient wherever it lies."""
    found = {}
    for name in TREES:
        found[name] = tmp_path_factory.mktemp(name)
        grow(name, found[name], SHAPE, SPACING)
    return found


def number(patient: str) -> int:
    return int(re.findall(r"\d+", patient)[-1])


def curated(folder: Path, roots: dict[str, Path], **more: Any) -> dict[str, Any]:
    datasets = [{"name": name, "root": root} for name, root in roots.items()]
    settings = Settings.model_validate(
        {"folder": folder, "datasets": datasets, "workers": 1, "shard_slices": 40, "limits": LOST, **more}
    )
    main(settings)
    facts: dict[str, Any] = json.loads((folder / "corpus.json").read_text())
    return facts


@pytest.mark.parametrize("name", TREES)
def test_a_layout_gives_the_expected_counts(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    found, refused = cases(name, roots[name])
    kept = [case for case in found if not case.held_out]
    facts = curated(tmp_path / "corpus", {name: roots[name]})["datasets"][name]
    assert (facts["volumes"], facts["slices"]) == (len(kept), len(kept) * SHAPE[0])
    expected = Counter(reason for _, reason, _ in refused)
    expected["held_out"] = len(found) - len(kept)
    assert facts["refused"] == dict(sorted((+expected).items()))


def test_all_layouts_together_leak_nothing(roots: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    facts = curated(folder, roots, split={"train": 0.5, "val": 0.5})
    assert set(facts["datasets"]) == set(CATALOGUE)
    assert verify(folder) == ()
    assert all(proof.shared == 0 for proof in proofs(folder, facts["rules"]))
    with (folder / "private" / "sources.csv").open(newline="") as file:
        volumes = {row["volume"]: row for row in csv.DictReader(file)}
    # But for chaos, which numbers by position, the number of a case is the patient that its phantom shows.
    held = {
        number(case.patient)
        for name in roots
        if name != "chaos"
        for case in cases(name, roots[name])[0]
        if case.held_out
    }
    held.add(TREES["chaos"].seeds[-1])
    kept = {volume: volumes[volume] for volume in read_index(folder, ["volume"])["volume"].to_pylist()}
    assert len(kept) > 20
    assert not {number(row["patient"]) for row in kept.values() if row["dataset"] != "chaos"} & held
    with (folder / "private" / "refused.csv").open(newline="") as file:
        reasons = Counter(row["reason"] for row in csv.DictReader(file))
    assert reasons["held_out_related"] > 5
