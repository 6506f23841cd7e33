"""`axial report folder=CORPUS`: what is in a corpus, what was left out and why, the proof that its splits are
apart, and under which licences it may be used.

Reads what `axial curate` left and a few slices; writes report.html (one file, readable without a network) and
report.png beside them. Both may be published: they name data sets and hashes, no file, path or person. Nothing else in
the corpus is changed.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from data_curation.aside import aside
from data_curation.report_facts import gather
from launch.run import Outcome
from launch.settings import Settings as Base

__all__ = ["Settings", "main"]


class Settings(Base):
    """Which corpus, and how much of it is shown."""

    folder: Path = Field(description="corpus folder, as made by `axial curate`; the report is written into it")
    tiles: int = Field(8, ge=1, le=64, description="slices of each data set on the contact sheet")
    sample: int = Field(48, ge=1, le=10_000, description="slices of each data set that are read for the HU histogram")


def main(settings: Settings) -> Outcome:
    """Writes report.html and report.png into the corpus folder. Not ok if the corpus breaks its own claims."""
    from data_curation.report_page import page
    from data_curation.report_pictures import overview

    facts = gather(settings.folder, settings.tiles, settings.sample)
    made = []
    for name, content in (("report.html", page(facts).encode()), ("report.png", overview(facts))):
        with aside(settings.folder / name) as file:
            file.write(content)
        made.append(str(settings.folder / name))
    return Outcome(made=tuple(made), next=tuple(f"look into it: {text}" for text in facts.wrong), ok=not facts.wrong)
