"""`axial catalogue [NAME] [root=FOLDER]`: the public CT sets, how to obtain one, and how much of it a folder holds.

Nothing is downloaded: most sets ask for a registration or for agreement to their terms.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from data_curation.catalogue import CATALOGUE, VALIDATION, Case, cases, missing
from data_curation.dataset import TEST_SET, Counts, DataSet
from launch.documents import near
from launch.run import Outcome
from launch.settings import Settings as Base

__all__ = ["Settings", "main"]

_SHOWN = 12  # runs of missing patients told in full


class Settings(Base):
    """What to tell."""

    name: str = Field("", description="a data set; without one all are listed")
    root: Path | None = Field(None, description="folder in which the data set lies: what is there, and what is missing")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name and name not in CATALOGUE:
            raise ValueError(f"no data set is called so{near(name, CATALOGUE)} (there are: {', '.join(CATALOGUE)})")
        return name

    @model_validator(mode="after")
    def _root_of_one(self) -> Self:
        if self.root is not None and not self.name:
            raise ValueError("root is the folder of one data set: say which, as in `axial catalogue lits root=FOLDER`")
        return self


def main(settings: Settings) -> Outcome:
    """Prints the table, or one data set. Raises CatalogueError where `root` does not hold it."""
    if not settings.name:
        print(_table())
        return Outcome(next=("axial catalogue NAME tells how to obtain one",))
    dataset = CATALOGUE[settings.name]
    print(_sheet(dataset))
    if settings.root is None:
        return Outcome(next=(f"axial catalogue {dataset.name} root=FOLDER tells what of it is in a folder",))
    print(f"\n{_there(dataset, settings.root)}")
    return Outcome()


def _table() -> str:
    rows = [("name", "volumes", "slices", "licence", "commercial", "home page")]
    for name, one in CATALOGUE.items():
        slices = f"{'~' if one.counts.about else ''}{one.counts.slices:,}" if one.counts else ""
        rows.append((name, _volumes(one.counts), slices, one.licence, _yes(one.commercial), one.home_page))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(n) if i in (1, 2) else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, wide, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", "volumes: to train on + official test set. The licence is the strictest one stated."])


def _volumes(counts: Counts | None) -> str:
    if counts is None:
        return ""
    return f"{counts.train:,}" + (f" + {counts.test:,}" if counts.test else "")


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _sheet(one: DataSet) -> str:
    """All that is known of one data set, a paragraph a fact; a fact that is not known has none."""
    held = [TEST_SET] if one.split or any(place.held_out for place in one.places) else []
    held += [VALIDATION] if one.benchmark else []
    paragraphs: list[tuple[str, Sequence[str]]] = [
        ("licence", [f"{stated.text} ({stated.source})" for stated in one.licences]),
        ("", [f"commercial use: {_yes(one.commercial)}; a corpus of it may be passed on: {_yes(one.redistribution)}"]),
        ("home page", [one.home_page]),
        ("volumes", [_counted(one.counts)]),
        ("held out", ["; ".join(held)]),
        ("to fetch", [_link(link.name, link.url, link.size, link.registration) for link in one.links]),
        ("tree", [one.tree]),
        ("labels", [", ".join(f"{number} {label}" for number, label in (one.labels or {}).items())]),
        ("left out", [f"{patient}: {why}" for patient, why in (one.known_bad or {}).items()]),
        ("no spacing", [f"{_runs(sorted(one.bogus_spacing, key=_key))}: the files say 1 x 1 x 1 mm"]),
        ("mind", one.quirks),
        ("overlaps", [f"{other}: {how}" for other, how in one.overlaps]),
        ("to cite", [one.citation, f"https://doi.org/{one.doi}"]),
    ]
    unknown = {"no spacing": not one.bogus_spacing, "to cite": not one.citation}
    lines = [f"{one.name}: {one.title}", ""]
    for heading, facts in paragraphs:
        if not unknown.get(heading):
            lines += _paragraph(heading, [fact for fact in facts if fact])
    return "\n".join(lines)


def _counted(counts: Counts | None) -> str:
    if counts is None:
        return ""
    test = f", {counts.test:,} in the {TEST_SET}" if counts.test else ""
    about = "about " if counts.about else ""
    return f"{counts.train:,} to train on{test}; {about}{counts.slices:,} slices in {counts.of:,} volumes"


def _link(name: str, url: str, size: str, registration: bool) -> str:
    notes = [note for note in (size, "after registration" if registration else "") if note]
    return f"{name}: {url}" + (f" ({', '.join(notes)})" if notes else "")


def _paragraph(heading: str, facts: Iterable[str]) -> list[str]:
    lines: list[str] = []
    for fact in facts:
        first = f"{heading if not lines else '':<12}"
        lines += textwrap.wrap(
            fact, 110, initial_indent=first, subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False
        )
    return lines


def _there(one: DataSet, root: Path) -> str:
    """What of the data set lies below `root`."""
    found, refused = cases(one.name, root)
    lines = [f"in {root}", ""]
    tests = [case for case in found if case.held_out == TEST_SET]
    whole = f" of {one.counts.train + one.counts.test:,}" if one.counts else ""
    lines += _paragraph(
        "found", [f"{len(found):,}{whole} cases, {sum(1 for case in found if case.label):,} with labels"]
    )
    reasons = Counter(case.held_out for case in found if case.held_out)
    lines += _paragraph("held out", [f"{count:,}: {why}" for why, count in reasons.most_common()])
    lines += _paragraph("missing", _missing(one, found, len(tests)))
    told: dict[str, list[str]] = {}
    for source, reason, detail in refused:
        told.setdefault(reason, []).append(f"{source}: {detail}")
    lines += _paragraph("refused", [f"{len(rows):,} {why}, such as {rows[0]}" for why, rows in sorted(told.items())])
    return "\n".join(lines)


def _missing(one: DataSet, found: Sequence[Case], tests: int) -> list[str]:
    if one.counts is None:
        return []
    if one.train_ids:
        gone = missing(one.name, found)
        parts = (("to train on", one.train_ids), (TEST_SET, one.test_ids))
        named = [(what, [patient for patient in gone if patient in set(ids)]) for what, ids in parts]
        return [f"{len(ids):,} ({what}): {_runs(ids)}" for what, ids in named if ids] or ["nothing"]
    short = (("to train on", one.counts.train - len(found) + tests), (TEST_SET, one.counts.test - tests))
    lines = [f"{count:,} ({what}); which numbers there are is not known" for what, count in short if count > 0]
    return lines or ["nothing"]


def _key(patient: str) -> tuple[str, int]:
    start, digits = _apart(patient)
    return start, int(digits or -1)


def _apart(patient: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)(\d*)", patient)
    assert match is not None
    return match[1], match[2]


def _runs(patients: Sequence[str]) -> str:
    """The patients as runs of consecutive numbers: `3 to 7, 12`; the first of many."""
    runs: list[list[str]] = []
    for patient in patients:
        start, number = _key(patient)
        if runs and _key(runs[-1][-1]) == (start, number - 1):
            runs[-1].append(patient)
        else:
            runs.append([patient])
    texts = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    rest = sum(map(len, runs[_SHOWN:]))
    return ", ".join(texts[:_SHOWN]) + (f" and {rest:,} more" if rest else "")
