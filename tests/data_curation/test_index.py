"""Links between volumes, splits, the fingerprint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_curation.index import SCHEMA, CorpusError, fingerprint, link, read_index, split_of
from data_curation.likeness_match import Alike
from data_curation.plan import Candidate, Plan, PlanRules, plan
from data_curation.shards import Shard

HALVES = {"train": 0.5, "val": 0.5}


def candidates(patients: list[int], slices: list[list[int]], held_out: int = -1) -> list[Candidate]:
    return [
        Candidate(
            f"v{i}",
            f"p{patient}",
            (f"p{patient}",),
            "stamp",
            f"set: file{i}",
            i == held_out,
            np.array(values, np.uint64),
            np.zeros(len(values), np.uint64),
            np.zeros(len(values), np.uint64),
        )
        for i, (patient, values) in enumerate(zip(patients, slices, strict=True))
    ]


def planned_from(
    some: list[Candidate], rules: PlanRules, alike: tuple[Alike, ...] = (), finished: tuple[Shard, ...] = ()
) -> Plan:
    return plan(some, link([one.names for one in some], [one.contents for one in some], alike), rules, finished)


def assigned(planned: Plan) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = {}
    for shard in planned.shards:
        for part in shard.parts:
            splits.setdefault(part.volume, set()).add(part.split)
    return splits


def test_every_column_is_described() -> None:
    assert all(field.metadata and len(field.metadata[b"description"]) > 5 and not field.nullable for field in SCHEMA)


def test_shared_slices_and_patients_tie_volumes() -> None:
    names = [["a"], ["b"], ["c"], ["a"], ["e"]]
    links = link(names, [np.array(v, np.uint64) for v in ([1, 2], [3], [3, 4], [4], [9, 9])])
    assert links.related.tolist() == [0, 0, 0, 0, 4]  # a-a by the patient; the third and fourth by 4; b and c by 3
    assert links.group.tolist() == [0, 1, 1, 1, 4]
    assert [list(flags) for flags in links.duplicate] == [[False] * 2, [False], [True, False], [True], [False, True]]


def test_uniform_slices_tie_nothing() -> None:
    links = link([["a"], ["b"]], [np.zeros(3, np.uint64), np.array([0, 5], np.uint64)])
    assert links.group.tolist() == [0, 1]
    assert not np.concatenate(links.duplicate).any()


def test_no_volumes() -> None:
    assert planned_from([], PlanRules(0, 10, HALVES, False)) == Plan((), {}, {})


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 40), min_size=1, max_size=4)), max_size=14),
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.booleans(),
)
def test_splits_are_disjoint_by_patient_and_pixels(
    volumes: list[tuple[int, list[int]]], seed: int, room: int, drop: bool
) -> None:
    patients, slices = [patient for patient, _ in volumes], [values for _, values in volumes]
    planned = planned_from(candidates(patients, slices), PlanRules(seed, room, HALVES, drop))
    splits = assigned(planned)
    assert all(len(names) == 1 for names in splits.values())
    assert set(splits) | set(planned.refused) == {f"v{i}" for i in range(len(volumes))}
    seen: dict[tuple[str, int], set[str]] = {}
    for i, (patient, values) in enumerate(volumes):
        for tie in [("patient", patient), *(("slice", value) for value in values if value)]:
            seen.setdefault(tie, set()).update(splits.get(f"v{i}", set()))
    assert all(len(names) <= 1 for names in seen.values())
    stored = [(part.volume, row) for shard in planned.shards for part in shard.parts for row in part.rows]
    assert len(stored) == len(set(stored))
    first = {(f"v{i}", j) for i, values in enumerate(slices) for j, value in enumerate(values) if not value}
    met: set[int] = set()
    for i, values in enumerate(slices):
        for j, value in enumerate(values):
            if value and value not in met:
                first.add((f"v{i}", j))
                met.add(value)
    unique = {
        (part.volume, row)
        for shard in planned.shards
        for part in shard.parts
        for row in part.rows
        if not part.duplicate
    }
    assert unique == first
    assert drop == (set(stored) == unique) or set(stored) == first


def test_what_is_related_to_a_held_out_case_is_refused() -> None:
    some = candidates([1, 2, 3, 1, 5], [[1, 2], [2, 3], [4], [5], [3]], held_out=0)
    planned = planned_from(some, PlanRules(0, 10, HALVES, False))
    assert set(planned.refused) == {"v1", "v3", "v4"}
    assert all(reason == "held_out_related" and "set: file0" in detail for reason, detail in planned.refused.values())
    assert set(assigned(planned)) == {"v2"}


def test_more_data_move_no_patient() -> None:
    names = [f"patient {i}" for i in range(400)]
    before = {name: split_of(name, 3, {"train": 0.9, "val": 0.1}) for name in names}
    assert 15 <= sum(split == "val" for split in before.values()) <= 65
    few = planned_from(candidates([1, 2], [[1], [2]]), PlanRules(3, 10, HALVES, False))
    many = planned_from(candidates([1, 2, 7, 8], [[1], [2], [3], [4]]), PlanRules(3, 10, HALVES, False))
    assert {volume: assigned(many)[volume] for volume in assigned(few)} == assigned(few)
    assert split_of("any", 0, {"train": 1.0, "val": 0.0}) == "train"
    assert split_of("any", 0, {"train": 0.0, "val": 1.0}) == "val"


def test_shards_hold_whole_volumes_and_fill_up() -> None:
    planned = planned_from(
        candidates(list(range(30)), [[10 * i + 1, 10 * i + 2] for i in range(30)]),
        PlanRules(0, 5, {"train": 1.0}, False),
    )
    assert [shard.slices for shard in planned.shards] == [6] * 10
    assert [shard.name for shard in planned.shards] == [f"train-{i:06d}" for i in range(10)]
    assert len({part.volume for shard in planned.shards for part in shard.parts}) == 30
    assert len({shard.plan for shard in planned.shards}) == 10


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_the_fingerprint_does_not_depend_on_order(order: list[int]) -> None:
    table = pa.table({"key": [f"k{i}" for i in range(6)], "sha256": [f"{i * 7}" for i in range(6)]})
    assert fingerprint([table.take(pa.array(order))]) == fingerprint([table.slice(0, 2), table.slice(2)])
    assert fingerprint([table.slice(1)]) != fingerprint([table])


def test_names_and_likeness_tie_volumes() -> None:
    alike = Alike(1, 2, 0.999, 3, np.array([True, False]))
    contents = [np.array(v, np.uint64) for v in ([1], [2], [3, 4], [5])]
    links = link([["a", "lits/7"], ["b"], ["c"], ["d", "lits/7"]], contents, [alike])
    assert links.related.tolist() == [0, 1, 1, 0]
    assert links.group.tolist() == [0, 1, 1, 3]
    assert [list(flags) for flags in links.duplicate] == [[False], [False], [True, False], [False]]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.integers(0, 30), min_size=1, max_size=4)), min_size=1, max_size=14
    ),
    st.integers(0, 14),
    st.integers(-1, 13),
    st.integers(0, 99),
)
def test_an_extension_touches_no_finished_shard_and_leaks_nothing(
    volumes: list[tuple[int, list[int]]], before: int, held_out: int, seed: int
) -> None:
    patients, slices = [patient for patient, _ in volumes], [values for _, values in volumes]
    rules = PlanRules(seed, 5, HALVES, False)
    first = planned_from(candidates(patients[:before], slices[:before]), rules)
    held = held_out if held_out >= before else -1
    order = list(dict.fromkeys(int(part.volume[1:]) for shard in first.shards for part in shard.parts))
    everything = candidates(patients, slices, held)
    some = [everything[i] for i in [*order, *(i for i in range(len(volumes)) if i not in order)]]
    second = planned_from(some, rules, finished=first.shards)
    assert second.shards[: len(first.shards)] == first.shards
    names = [shard.name for shard in second.shards]
    assert len(names) == len(set(names))
    ties: dict[tuple[str, int], set[str]] = {}
    for volume, splits in assigned(second).items():
        if volume not in second.withdrawn:
            for tie in [("patient", patients[int(volume[1:])]), *(("slice", v) for v in slices[int(volume[1:])] if v)]:
                ties.setdefault(tie, set()).update(splits)
    assert all(len(splits) == 1 for splits in ties.values())
    if 0 <= held < len(volumes):
        secret = [("patient", patients[held]), *(("slice", value) for value in slices[held] if value)]
        assert not [tie for tie in secret if tie in ties]
    again = planned_from(some, rules, finished=second.shards)
    assert again.shards == second.shards


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="make one with `axial curate`"):
        read_index(tmp_path)
    (tmp_path / "index.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(CorpusError, match=r"index\.parquet cannot be read"):
        read_index(tmp_path)
