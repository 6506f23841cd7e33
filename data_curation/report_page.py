"""The facts of a corpus as one HTML page. Its texts are escaped; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape

from data_curation.catalogue import CATALOGUE
from data_curation.report import Facts
from data_curation.report_pictures import LEVEL, WINDOW, charts, contact_sheet, png

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
        _split(facts),
        "<h2>Measures</h2>",
        _charts_twice(facts),
        _sheet(facts),
        _refused(facts),
        _sources(facts),
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
    sets, refused = facts.sets, sum(refusal.count for refusal in facts.refusals)
    numbers = (
        ("data sets", f"{len(sets):,}"),
        ("patients", f"{sum(s.patients for s in sets):,}"),
        ("volumes kept", f"{sum(s.volumes for s in sets):,}"),
        ("slices kept", f"{sum(s.slices for s in sets):,}"),
        ("stored", _bytes(sum(s.size for s in sets))),
        ("files refused", f"{refused:,}"),
    )
    tiles = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in numbers)
    verdict = (
        '<p class="verdict bad">This corpus breaks its own claims: ' + escape("; ".join(facts.wrong)) + ".</p>"
        if facts.wrong
        else '<p class="verdict good">No patient, duplicate group or pixel content is in more than one split.</p>'
    )
    return (
        f"<h1>Corpus {escape(facts.folder.resolve().name)}</h1>"
        f"<p>Fingerprint <code>{escape(facts.fingerprint)}</code></p>"
        f'<div class="tiles">{tiles}</div>{verdict}'
    )


def _kept(facts: Facts) -> str:
    heads = ("data set", "patients", "volumes", "refused", "slices", "repeated", "of test sets", "stored ")
    rows = []
    for s in facts.sets:
        counts = (s.patients, s.volumes, facts.refused.get(s.name, 0), s.slices, s.duplicates, s.held_out)
        rows.append((s.name, *counts, _bytes(s.size), _range(s.between), _range(s.within), s.licence))
    note = "Repeated slices have the content of an earlier slice; readers leave them out."
    lost = sorted(set(facts.refused) - {s.name for s in facts.sets})
    if lost:
        note += " Nothing was kept of " + ", ".join(f"{name} ({facts.refused[name]:,} refused)" for name in lost) + "."
    table = _table((*heads, "mm between slices ", "mm between pixels ", "licence"), rows)
    return f"<h2>Kept</h2>{table}<p>{escape(note)}</p>"


def _split(facts: Facts) -> str:
    heads = ("split", "slices", "volumes", "patients", "duplicate groups")
    rows = [(s.name, s.slices, s.volumes, s.patients, s.groups) for s in facts.splits]
    lines = []
    for proof in facts.proofs:
        kind = "bad" if proof.shared else "good"
        lines.append(
            f'<tr><td>{escape(proof.what)}</td><td class="n">{proof.total:,}</td>'
            f'<td class="n {kind}">{proof.shared:,}</td></tr>'
        )
    proofs = '<tr><th>compared</th><th class="n">different</th><th class="n">in more than one split</th></tr>'
    return (
        f"<h2>Splits</h2>{_table(heads, rows)}"
        f'<h2>Proof that the splits are apart</h2><div class="wide"><table>{proofs}{"".join(lines)}</table></div>'
        "<p>Counted from the rows of the index; slices of one value alone are not compared.</p>"
    )


def _refused(facts: Facts) -> str:
    if not facts.refusals:
        return "<h2>Refused</h2><p>Nothing was refused.</p>"
    most = max(refusal.count for refusal in facts.refusals)
    parts = []
    for refusal in facts.refusals:
        left = refusal.count - len(refusal.rows)
        more = f"<p>and {left:,} more in refused.csv</p>" if left else ""
        listing = _table(("data set", "file", "why"), refusal.rows)
        parts.append(
            f'<details><summary><span class="bar" style="width:{max(0.2, 14 * refusal.count / most):.1f}rem"></span> '
            f"<b>{escape(refusal.reason)}</b> {refusal.count:,}</summary>{listing}{more}</details>"
        )
    note = "<p>Names are those of the source files, as in refused.csv: leave them out of what you publish.</p>"
    return f"<h2>Refused, by reason</h2>{note}{''.join(parts)}"


def _sources(facts: Facts) -> str:
    rows = []
    for kept in facts.sets:
        entry = CATALOGUE.get(facts.catalogue_name(kept.name))
        told = (
            (entry.title, kept.licence, entry.citation, entry.doi or entry.home_page)
            if entry
            else ("", kept.licence, "", "")
        )
        rows.append((kept.name, *told))
    record = [(key, json.dumps(value, ensure_ascii=False).strip('"')) for key, value in facts.recorded.items()]
    listed = _table(("data set", "title", "licence", "to cite", "where"), rows)
    return f"<h2>Licences and citations</h2>{listed}<h2>Record</h2>{_table(('corpus.json', ''), record)}"


def _sheet(facts: Facts) -> str:
    parts = [
        f"<h2>Contact sheet</h2><p>Window {LEVEL}/{WINDOW} HU, slices at even distances through each data set.</p>"
    ]
    for name, tiles in facts.tiles.items():
        keys = ", ".join(tile.key for tile in tiles)
        parts.append(
            f'<figure><img class="ct" alt="{escape(name)}: {len(tiles)} slices" title="{escape(keys)}" '
            f'src="{_uri(png(contact_sheet(tiles)))}"><figcaption>{escape(name)}</figcaption></figure>'
        )
    return "".join(parts)


def _charts_twice(facts: Facts) -> str:
    light, dark = (_uri(charts(facts, is_dark)) for is_dark in (False, True))
    text = "Histograms of spacing between slices, spacing between pixels, slices of a volume, and HU, by data set"
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{text}" src="{light}"></picture></figure>'
    )


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _range(values: tuple[float, float]) -> str:
    low, high = (f"{value:.2f}" for value in values)
    return low if low == high else f"{low} – {high}"


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
