"""The facts of a corpus as one HTML page. Its texts are escaped; nothing is loaded from elsewhere.

It may be published: it names data sets, reasons and hashes, never a file, a path or a person.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from data_curation.catalogue import CATALOGUE
from data_curation.report_facts import DataSetFacts, Facts
from data_curation.report_pictures import LEVEL, WINDOW, charts, contact_sheet, png
from launch.progress import duration, rate

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6771; --line: #d9dee4; --back: #fff; --card: #f6f7f9;
  --good: #1a7f4b; --bad: #c0312b; --bar: #3b78c3; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --soft: #98a3af; --line: #323a43; --back: #14181d;
  --card: #1c2229; --good: #4cc38a; --bad: #ff7b72; --bar: #5b95dd; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 76rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption, summary small { color: var(--soft); } code { font-size: .86em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); } th, td { padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; } .good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: flex; flex-wrap: wrap; gap: 1.6rem; margin: 1.2rem 0; }
.tiles b { display: block; font-size: 1.5rem; }
.bar { display: inline-block; height: .6em; background: var(--bar); border-radius: 2px; min-width: 2px; }
img { max-width: 100%; height: auto; } img.ct { background: #000; border-radius: 4px; } figure { margin: 0 0 1.2rem; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; } summary { cursor: pointer; }
.verdict { background: var(--card); padding: .7rem 1rem; border-radius: 6px; }
"""


def page(facts: Facts) -> str:
    """The whole report as one HTML document; pictures are inside it."""
    body = [
        _head(facts),
        _kept(facts),
        _dropped(facts),
        _split(facts),
        _duplicates(facts),
        _held_out(facts),
        "<h2>Measures</h2>",
        _charts_twice(facts),
        _sheet(facts),
        _sources(facts),
        _record(facts),
    ]
    title = f"Corpus {facts.fingerprint[:12]}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of escaped texts; columns of numbers, and those whose head ends in a blank, stand to the right."""
    listed = [list(row) for row in rows]
    right = [
        all(isinstance(row[i], int | float) for row in listed) or head.endswith(" ") for i, head in enumerate(heads)
    ]

    def line(tag: str, cells: Sequence[object]) -> str:
        texts = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]
        marks = [' class="n"' if number else "" for number in right]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(t)}</{tag}>" for m, t in zip(marks, texts, strict=True)) + "</tr>"

    return f'<div class="wide"><table>{line("th", heads)}{"".join(line("td", row) for row in listed)}</table></div>'


def _head(facts: Facts) -> str:
    sets = facts.sets
    numbers = (
        ("data sets", f"{len(facts.kept):,}"),
        ("patients", f"{sum(s.patients for s in sets):,}"),
        ("volumes kept", f"{sum(s.volumes for s in sets):,}"),
        ("slices kept", f"{sum(s.slices for s in sets):,}"),
        ("stored", _bytes(sum(s.size for s in sets))),
        ("scans refused", f"{sum(sum(s.refused.values()) for s in sets):,}"),
        ("slices left out", f"{sum(sum(s.left_out.values()) for s in sets):,}"),
    )
    tiles = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in numbers)
    verdict = (
        '<p class="verdict bad">This corpus breaks its own claims: ' + escape("; ".join(facts.wrong)) + ".</p>"
        if facts.wrong
        else '<p class="verdict good">No patient, duplicate group or pixel content is both in train and val, '
        "and nothing held out is in either.</p>"
    )
    return (
        f"<h1>Corpus {escape(facts.fingerprint[:12])}</h1>"
        f"<p>Fingerprint <code>{escape(facts.fingerprint)}</code></p>"
        f'<div class="tiles">{tiles}</div>{verdict}{_speed(facts)}'
    )


def _speed(facts: Facts) -> str:
    told = facts.throughput
    if not told or told["seconds"] <= 0:
        return ""
    speed = rate(told["slices_read"] / told["seconds"])
    text = f"The last run of axial curate read {told['slices_read']:,.0f} slices in {duration(told['seconds'])}: "
    return f"<p>{escape(text)}{speed} slices/s with {told['workers']:.0f} workers.</p>"


def _kept(facts: Facts) -> str:
    heads = ("data set", "patients", "volumes", "slices", "repeated", "of test sets", "bytes ", "area stored ")
    rows = []
    for s in facts.kept:
        mine = facts.volumes.of(s.name)
        counts = (s.patients, s.volumes, s.slices, s.duplicates, s.test_cases)
        share = f"{s.stored:.0%}, without {s.unstored_body:.2%}"
        ranges = (_range(mine.between.tolist()), _range(mine.within.tolist()))
        rows.append((s.name, *counts, _bytes(s.size), share, *ranges))
    note = (
        "Repeated slices have the content of an earlier slice; readers leave them out. Of each slice the box around "
        "the patient is stored: area stored is its share of the scan's frame; without what share of the frame is above "
        "-500 HU and outside of the box (couch, cables, noise)."
    )
    lost = [s.name for s in facts.sets if not s.slices]
    if lost:
        note += " Nothing was kept of " + ", ".join(lost) + "."
    table = _table((*heads, "mm between slices ", "mm between pixels "), rows)
    return f"<h2>Kept</h2>{table}<p>{escape(note)}</p>"


def _dropped(facts: Facts) -> str:
    """Scans and slices that are not in the corpus, by reason and data set."""
    scans = _by_reason({s.name: s.refused for s in facts.sets})
    slices = _by_reason({s.name: s.left_out for s in facts.sets})
    note = (
        "<p>private/refused.csv, which stays with whoever curated, names every file and what is wrong with it; "
        "refused.parquet has the hashed names.</p>"
    )
    return (
        f"<h2>Refused scans, by reason</h2>{scans or '<p>Nothing was refused.</p>'}{note if scans else ''}"
        "<h2>Slices left out of kept scans, by reason</h2>"
        f"{slices or '<p>None.</p>'}{'<p>left_out.parquet names each of them.</p>' if slices else ''}"
    )


def _by_reason(counts: Mapping[str, Mapping[str, int]]) -> str:
    """A table of reasons by data sets with a bar for each reason's total; "" if there is nothing to count."""
    totals: dict[str, int] = {}
    for one in counts.values():
        for reason, number in one.items():
            totals[reason] = totals.get(reason, 0) + number
    if not totals:
        return ""
    names = [name for name, one in counts.items() if one]
    most = max(totals.values())
    lines = ["".join(f"<th{c}>{escape(t)}</th>" for t, c in (("reason", ""), ("all", _N), *((n, _N) for n in names)))]
    for reason, total in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        bar = f'<span class="bar" style="width:{max(0.2, 8 * total / most):.1f}rem"></span> '
        cells = "".join(f"<td{_N}>{counts[name].get(reason, 0):,}</td>" for name in names)
        lines.append(f"<td>{escape(reason)}</td><td{_N}>{bar}{total:,}</td>{cells}")
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


_N = ' class="n"'


def _split(facts: Facts) -> str:
    heads = ("split", "slices", "volumes", "patients", "duplicate groups")
    rows = [(s.name, s.slices, s.volumes, s.patients, s.groups) for s in facts.splits]
    lines = []
    for proof in facts.proofs:
        kind = "bad" if proof.shared else "good"
        cells = f"<td{_N}>{proof.left:,}</td><td{_N}>{proof.right:,}</td>"
        shared = f'<td class="n {kind}">{proof.shared:,}</td>'
        sides = "".join(f"<td>{escape(text)}</td>" for text in (proof.what, *proof.sides))
        lines.append(f"<tr>{sides}{cells}{shared}</tr>")
    titles = "".join(f"<th>{text}</th>" for text in ("compared", "one side", "other side"))
    titles += "".join(f"<th{_N}>{text}</th>" for text in ("one", "other", "in both"))
    return (
        f"<h2>Splits</h2>{_table(heads, rows)}<h2>Proof that the splits are apart</h2>"
        f'<div class="wide"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'
        "<p>Numbers of different values, counted from the index. Uniform slices are not compared by content: they say "
        "nothing about where they come from.</p>"
    )


def _duplicates(facts: Facts) -> str:
    found = facts.duplicates
    text = (
        f"{found.volumes:,} kept volumes are copies of one another, in {found.groups:,} groups; {found.across:,} "
        "groups span more than one data set."
    )
    drops = facts.recorded.get("rules", {}).get("duplicates") == "drop"
    if drops:
        text += " Slices seen before were dropped, so volumes that held nothing new are among the refused scans."
    if not found.groups:
        return f"<h2>Duplicates</h2><p>{escape(text)}</p>"
    named = [i for i in range(len(found.names)) if found.shared[i].any()]
    heads = ("volumes of ", *(f"with a copy in {found.names[j]} " for j in named))
    rows = [(found.names[i], *(int(found.shared[i, j]) for j in named)) for i in named]
    return f"<h2>Duplicates</h2><p>{escape(text)}</p>{_table(heads, rows)}"


def _held_out(facts: Facts) -> str:
    reasons = ("held_out", "held_out_related")
    rows = [
        (s.name, *(s.refused.get(reason, 0) for reason in reasons), s.test_cases, "; ".join(_counted(s.excluded)))
        for s in facts.sets
        if any(s.refused.get(reason) for reason in reasons) or s.test_cases or s.excluded
    ]
    if not rows:
        return "<h2>Kept out of training</h2><p>No scan is held out for testing.</p>"
    heads = ("data set", "scans held out", "tied to one of them", "let in on request", "withdrawn from finished shards")
    note = "Tied: the same patient, or the same slices, under whatever name."
    return f"<h2>Kept out of training</h2>{_table(heads, rows)}<p>{note}</p>"


def _counted(reasons: Mapping[str, int]) -> list[str]:
    return [f"{count:,} slices {reason}" for reason, count in reasons.items()]


def _sources(facts: Facts) -> str:
    rows = [(s.name, *_rights(s), *_cited(s)) for s in facts.kept]
    listed = _table(("data set", "licence", "commercial use", "may be passed on", "title", "to cite", "where"), rows)
    used, passed = ("may" if all(row[i] == "yes" for row in rows) else "may not, as a whole," for i in (2, 3))
    text = (
        f"By the strictest licence of each data set, this corpus {used} be used commercially and {passed} be passed on."
    )
    return f"<h2>Licences and citations</h2>{listed}<p>{text} Unknown counts as no.</p>"


def _rights(one: DataSetFacts) -> tuple[str, str, str]:
    """(licence, commercial use, may be passed on). The catalogue speaks only for the licence that it knows."""
    entry = CATALOGUE.get(one.catalogue)
    known = entry is not None and not entry.anything and one.licence == entry.licence
    passed = ("yes" if entry.redistribution else "no") if entry is not None and known else "unknown"
    return one.licence or "unknown", ("yes" if one.commercial else "no" if known else "unknown"), passed


def _cited(one: DataSetFacts) -> tuple[str, str, str]:
    entry = CATALOGUE.get(one.catalogue)
    if entry is None:
        return "", "", ""
    where = f"https://doi.org/{entry.doi}" if entry.doi else entry.home_page
    return entry.title, entry.citation, where


def _record(facts: Facts) -> str:
    record = [(key, json.dumps(value, ensure_ascii=False).strip('"')) for key, value in facts.recorded.items()]
    return f"<h2>Record</h2>{_table(('corpus.json', ''), record)}"


def _sheet(facts: Facts) -> str:
    parts = [
        f"<h2>Contact sheet</h2><p>Window {LEVEL}/{WINDOW} HU, slices at even distances through each data set.</p>"
    ]
    for name, tiles in facts.tiles.items():
        if not tiles:
            continue  # all its slices were withdrawn
        keys = ", ".join(tile.key for tile in tiles)
        parts.append(
            f'<figure><img class="ct" alt="{escape(name)}: {len(tiles)} slices" title="{escape(keys)}" '
            f'src="{_uri(png(contact_sheet(tiles)))}"><figcaption>{escape(name)}</figcaption></figure>'
        )
    return "".join(parts)


def _charts_twice(facts: Facts) -> str:
    light, dark = (_uri(charts(facts, is_dark)) for is_dark in (False, True))
    text = (
        "Histograms by data set: spacing between slices and between pixels, slices of a volume, share of the frame "
        "that is stored, bytes of a slice, HU"
    )
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{text}" src="{light}"></picture></figure>'
    )


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} – {high}"


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
