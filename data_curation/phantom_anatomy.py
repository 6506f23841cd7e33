"""The phantom's anatomy, painted from the outside in: the last organ painted owns the voxel.

Coordinates are a template patient's, in mm and LPS: x to the patient's left, y to the back, z to the head; z = 0 lies
near the first lumbar vertebra. A patient is the template scaled, bent by smooth random waves, and with every organ
moved, sized and turned on its own. All of it is in mm, so the same seed gives the same patient on any grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_curation.phantom_canvas import Array, Box, Canvas, Chain, melt, rotation
from data_curation.phantom_patient import ORGANS, Patient

__all__ = ["paint_patient"]

LABEL = {name: label for label, name in ORGANS.items()}


def paint_patient(patient: Patient, z: Array, y: Array, x: Array) -> tuple[Array, NDArray[np.uint8]]:
    """HU without noise and labels, both [Z, Y, X], at voxel centres in mm (z to the head, y to the back)."""
    axes = tuple((axis / scale).astype(np.float32) for axis, scale in zip((z, y, x), patient.scale, strict=True))
    c = Canvas((axes[0], axes[1], axes[2]), patient.bend, patient.mottle, patient.hu["air"])
    cage = _trunk(c, patient)
    dome = _chest(c, patient, cage)
    _gut(c, patient, cage)
    _muscles(c, patient)
    _liver(c, patient, np.maximum(cage, dome) + 3)
    _left_upper(c, patient, np.maximum(cage, dome) + 4)
    _kidney(c, patient, "kidney_right", -1.0)
    _kidney(c, patient, "kidney_left", 1.0)
    _vessels(c, patient)
    _spine(c, patient)
    _ribs(c, patient, cage)
    return c.hu, c.labels


def _moved(rng: np.random.Generator, points: Chain, mm: float, size: float) -> NDArray[np.float64]:
    """The chain of (x, y, z, radius) moved as a whole, each point a little more, and its radii scaled."""
    chain = np.asarray(points, float)
    chain[:, :3] += rng.normal(0, mm, 3) + rng.normal(0, mm / 4, (len(chain), 3))
    chain[:, 3] *= rng.uniform(1 - size, 1 + size)
    return chain


def _trunk(c: Canvas, p: Patient) -> Array:
    """Table, skin, fat, wall and cavity; returns the distance in mm outside the cavity, along rays from its middle."""
    z, y, x = c.axes
    across = np.interp(z, (-260, -150, -70, 40, 120, 200), (118, 112, 115, 122, 126, 108)).astype(np.float32)[
        :, None, None
    ]
    deep = np.interp(z, (-260, -150, -70, 40, 120, 200), (82, 78, 81, 86, 92, 84)).astype(np.float32)[:, None, None]
    away_x, away_y = np.abs(c.x), c.y + 4
    q = ((away_x / across) ** 2.4 + np.abs(away_y / deep) ** 2.4) ** np.float32(1 / 2.4)
    r = np.hypot(away_x, away_y)
    cage = r * (1 - 1 / np.maximum(q, 1e-2))
    side = np.square(away_x / np.maximum(r, 1))
    rectus = 7 * np.exp(-np.square(np.square((away_x - 30) / 22)))
    front = p.wall * side + (1 - side) * (3.5 + rectus)
    wall = np.where(away_y < 0, front, p.wall + 13 * (1 - side) ** 2)
    skin = cage - np.where(away_y < 0, p.wall * side + 10 * (1 - side), wall) - p.fat * (0.8 + 0.35 * side)
    back = -4 + 84 + p.wall + 13 + 0.8 * p.fat + 3
    shell = (np.abs(y[:, None] - (back + 13) + np.square(x) / 1500) - 13)[None].repeat(len(z), 0)
    c.paint(c.all, shell, p.hu["table"])
    c.paint(c.all, shell + 3, p.hu["foam"])
    c.paint(c.all, skin, p.hu["skin"])
    c.paint(c.all, skin + 2.2, p.hu["fat"] + 4 * c.mottle)
    c.paint(c.all, cage - wall, p.hu["muscle"] + 6 * c.mottle)
    c.paint(c.all, cage, p.hu["visceral_fat"] + 5 * c.mottle)
    return np.asarray(cage, np.float32)


def _chest(c: Canvas, p: Patient, cage: Array) -> Array:
    """Lungs above the diaphragm, heart; returns the distance outside the diaphragm's domes."""
    rng = p.rng("diaphragm")
    lift = rng.normal(0, 6, 2)
    right = c.blob(c.all, (-60, -6, 0), (68, 84, 100 + lift[0]))
    left = c.blob(c.all, (62, -4, 0), (66, 82, 84 + lift[1]))
    dome = melt(right, left, 22)
    recess = 34 - 0.25 * c.y - c.z
    middle = c.blob(c.all, (4, 52, 60), (30, 42, 400))
    heart = c.blob(c.all, (14, -40, 126), (60, 44, 52), rotation(rng, (0, 20, 20), 4))
    lung = np.maximum.reduce([cage + 3, -dome, recess, -middle, -heart])
    vessels = np.clip(c.mottle - 1.5, 0, 1) * 620
    c.paint(c.all, lung, p.hu["lung"] + 14 * c.mottle + vessels, LABEL["lungs"])
    under = np.maximum.reduce([cage + 1, dome, recess - 3])
    c.paint(c.all, under, p.hu["muscle"])
    c.paint(c.all, under + 3, p.hu["visceral_fat"])
    c.paint(c.all, np.maximum(heart, cage + 3), p.hu["muscle"])
    c.paint(c.all, np.maximum(heart, cage + 3) + 9, p.hu["heart"])
    return dome


def _bowel(c: Canvas, p: Patient, box: Box, f: Array, air: float) -> None:
    """Wall, content, and gas above y = air: gas rises to the front of a patient who lies on the back."""
    content = p.hu["gut_fluid"] + 12 * c.mottle[box]
    c.paint(box, f, p.hu["gut_wall"])
    c.paint(box, f + 3, content)
    c.paint(box, np.maximum(f + 3, c.y[box] - air), p.hu["air"])


def _gut(c: Canvas, p: Patient, cage: Array) -> None:
    """Small bowel as packed loops, colon and duodenum."""
    rng = p.rng("bowel")
    for z in range(-230, -10, 27):
        for y in (-64, -38, -13):
            for x in range(-78, 80, 27):
                centre = np.array((x, y, z)) + rng.normal(0, 4.0, 3)
                radii, turn = rng.uniform((14, 11, 11), (22, 15, 15)), rotation(rng, (0, 0, 0), 60)
                gas = float(centre[1]) - 6 if rng.random() < 0.2 else -999.0
                box, f = c.ball(centre, radii, turn)
                if f.size:
                    _bowel(c, p, box, np.maximum(f, cage[box] + 4), gas)
    rng = p.rng("colon")
    colon = [
        (98, 24, -170, 14),
        (100, 20, -45, 15),
        (94, 0, 0, 17),
        (72, -48, 2, 18),
        (24, -70, -34, 18),
        (-40, -70, -44, 18),
    ]
    colon += [(-88, -36, -46, 20), (-94, 6, -72, 21), (-88, 14, -170, 22)]
    box, f = c.tube(_moved(rng, colon, 4, 0.15))
    _bowel(c, p, box, np.maximum(f + 1.6 * c.mottle[box], cage[box] + 3), float(rng.uniform(-70, -58)))
    rng = p.rng("duodenum")
    duodenum = [
        (-24, -44, -12, 12),
        (-48, -26, -16, 12),
        (-50, -8, -40, 12),
        (-38, -2, -60, 11),
        (0, -4, -64, 11),
        (26, -12, -50, 11),
    ]
    box, f = c.tube(_moved(rng, duodenum, 2, 0.1))
    _bowel(c, p, box, f, -999.0)


def _muscles(c: Canvas, p: Patient) -> None:
    """Beside and behind the spine: psoas, quadratus lumborum, erector spinae; crura of the diaphragm."""
    value = p.hu["muscle"]
    for side in (-1.0, 1.0):
        for centre, radii, degrees in (
            ((30, 82, 0), (26, 17, 900), 0),
            ((36, 44, -150), (21, 24, 128), 0),
            ((62, 70, -90), (22, 11, 92), -20),
        ):
            turn = rotation(np.random.default_rng(0), (0, 0, side * degrees), 0)
            box, f = (
                c.ball((side * centre[0], *centre[1:]), radii, turn)
                if degrees
                else c.ball((side * centre[0], *centre[1:]), radii)
            )
            if f.size:
                c.paint(box, f, value + 9 * c.mottle[box])
        box, f = c.tube([(side * 16, 30, -60, 5), (side * 20, 20, 20, 7), (side * 16, 8, 70, 6)])
        c.paint(box, f, value)


def _liver(c: Canvas, p: Patient, room: Array) -> None:
    """Right, left and caudate lobes, their veins, the gallbladder in its bed."""
    rng = p.rng("liver")
    shift, grow = rng.normal(0, 4, 3), rng.uniform(0.9, 1.1, (2, 3))
    box = c.box((-135, -100, -90), (90, 80, 115))
    if not c.x[box].size:
        return
    right = c.blob(box, np.add(shift, (-64, -2, 16)), grow[0] * (60, 72, 82))
    left = c.blob(box, np.add(shift, (0, -46, 38)), grow[1] * (60, 30, 42), rotation(rng, (0, 12, -8), 5))
    caudate = c.blob(box, np.add(shift, (-14, -6, 32)), (17, 19, 24))
    kidney = c.blob(box, (-44, 48, -34), (44, 38, 66))
    porta = c.blob(box, np.add(shift, (-6, -12, -16)), (36, 40, 34))
    f = np.maximum.reduce([melt(melt(right, left, 16), caudate, 6), -kidney, -porta, room[box]])
    c.paint(box, f, p.hu["liver"] + 3 * c.mottle[box], LABEL["liver"])
    for name, chain in (
        ("vein", [(-20, 2, 84, 6), (-60, 6, 60, 5), (-98, 14, 36, 2.5)]),
        ("vein", [(-20, 0, 84, 5), (-46, -26, 58, 4.5), (-62, -46, 30, 2)]),
        ("vein", [(-18, -4, 84, 5), (-6, -36, 58, 4), (20, -54, 44, 2)]),
        ("portal_vein", [(-26, -14, 12, 7), (-52, -8, 20, 6), (-80, 14, 14, 4), (-96, 30, 0, 2)]),
        ("portal_vein", [(-52, -8, 20, 5), (-78, -28, 26, 3.5), (-92, -40, 20, 2)]),
        ("portal_vein", [(-26, -14, 12, 6), (-16, -36, 32, 5), (12, -52, 36, 2.5)]),
    ):
        part, tube = c.tube(_moved(rng, chain, 3, 0.2))
        c.paint(part, np.maximum(tube, _within(f, box, part)), p.hu[name], None)
    box, fissure = c.tube([(-4, -76, 26, 3), (-12, -40, 16, 4)])
    c.paint(box, fissure, p.hu["visceral_fat"])
    rng = p.rng("gallbladder")
    centre = np.array((-46, -50, -20)) + rng.normal(0, 5, 3)
    box, f = c.ball(centre, rng.uniform((14, 16, 24), (18, 21, 32)), rotation(rng, (-15, 0, 25), 10))
    if f.size:
        sac = np.asarray(np.maximum(f, room[box]), np.float32)
        c.paint(box, sac, p.hu["gut_wall"], LABEL["gallbladder"])
        c.paint(box, sac + 1.2, p.hu["bile"], LABEL["gallbladder"])


def _within(f: Array, box: Box, part: Box) -> Array:
    """f of `box` read at `part`; far outside where `part` leaves `box`."""
    out = np.full([max(0, s.stop - s.start) for s in part], 9.0, np.float32)
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, part, strict=True))
    if all(s.stop > s.start for s in both):
        to = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(both, part, strict=True))
        out[to] = f[tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(both, box, strict=True))]
    return out


def _left_upper(c: Canvas, p: Patient, room: Array) -> None:
    """Spleen, pancreas, and the stomach in front of it."""
    rng = p.rng("spleen")
    grow, shift = rng.uniform(0.88, 1.15, 3), rng.normal(0, 4, 3)
    centre = np.add(shift, (86, 34, 28))
    box, f = c.ball(centre, grow * (27, 46, 47), rotation(rng, (10, 0, -18), 6))
    if f.size:
        hollow = c.blob(box, np.add(shift, (56, 16, 18)), (31, 36, 54))
        c.paint(box, np.maximum.reduce([f, -hollow, room[box]]), p.hu["spleen"] + 3 * c.mottle[box], LABEL["spleen"])
    rng = p.rng("pancreas")
    pancreas = [
        (-30, -16, -34, 11),
        (-28, -20, -14, 14),
        (-4, -26, 0, 10.5),
        (24, -18, 8, 11),
        (48, 2, 14, 10.5),
        (66, 18, 18, 9),
    ]
    box, f = c.tube(_moved(rng, pancreas, 4, 0.12))
    if f.size:
        c.paint(box, f + c.mottle[box], p.hu["pancreas"] + 6 * c.mottle[box], LABEL["pancreas"])
    rng = p.rng("stomach")
    stomach = [
        (62, 0, 54, 31),
        (58, -20, 38, 32),
        (50, -38, 16, 27),
        (34, -50, -8, 21),
        (6, -54, -22, 17),
        (-20, -46, -18, 13),
    ]
    box, f = c.tube(_moved(rng, stomach, 5, 0.14))
    if f.size:
        f, label = np.maximum(f, room[box] + 2), LABEL["stomach"]
        c.paint(box, f, p.hu["gut_wall"], label)
        c.paint(box, f + 4.5, p.hu["gut_fluid"] + 8 * c.mottle[box], label)
        c.paint(box, np.maximum(f + 4.5, c.y[box] - float(rng.uniform(-62, -40))), p.hu["air"], label)


def _kidney(c: Canvas, p: Patient, name: str, side: float) -> None:
    """Cortex, medulla, the unlabelled sinus (fat, pelvis) that opens to the middle and front; the adrenal above."""
    rng = p.rng(name)
    centre = np.array((side * 60, 36, -22 if side > 0 else -36)) + rng.normal(0, 5, 3)
    turn = rotation(rng, (-8, side * 8, side * 35), 5)
    box, f = c.ball(centre, rng.uniform((24, 27, 47), (29, 32, 57)), turn)
    if f.size:
        opening = centre + turn.T @ (-side * 15, 0, 0)
        sinus = c.blob(box, opening, (17, 9, 25), turn)
        c.paint(box, f, p.hu["renal_cortex"], LABEL[name])
        c.paint(box, f + 6.5 + 1.6 * c.mottle[box], p.hu["renal_medulla"], LABEL[name])
        c.paint(box, np.maximum(sinus, f), p.hu["visceral_fat"])
        c.paint(box, c.blob(box, opening, (9, 4, 14), turn), p.hu["gut_fluid"])
    box, f = c.tube([(side * 34, 20, 34, 2.5), (side * 40, 30, 26, 4), (side * 48, 36, 20, 2.5)])
    c.paint(box, f, p.hu["pancreas"])


def _vessels(c: Canvas, p: Patient) -> None:
    """Aorta, inferior vena cava, and the branches that show in every slice."""
    rng = p.rng("vessels")
    wide = rng.uniform(0.92, 1.12, 2)
    branches: list[tuple[str, Chain]] = [
        ("portal_vein", [(-12, -22, -100, 6), (-9, -22, -10, 6), (-26, -14, 12, 7)]),
        ("portal_vein", [(-9, -22, -2, 5), (24, -8, 8, 4.5), (58, 16, 18, 4)]),
        ("vein", [(46, 30, -22, 4.5), (20, 4, -20, 4.5), (-14, 10, -18, 5)]),
        ("vein", [(-44, 30, -34, 4.5), (-22, 16, -30, 5)]),
        ("aorta", [(10, 8, -6, 4), (2, -14, -24, 4.2), (2, -24, -100, 3.8)]),
        ("aorta", [(10, 8, 12, 3.6), (8, -8, 14, 3.4), (-16, -14, 18, 2.5)]),
        ("aorta", [(12, 18, -24, 3.4), (46, 32, -24, 3)]),
        ("aorta", [(4, 20, -28, 3.4), (-44, 34, -34, 3)]),
    ]
    for tissue, chain in branches:
        box, f = c.tube(_moved(rng, chain, 1.5, 0.15))
        c.paint(box, f, p.hu[tissue])
    cava: Chain = [
        (-20, 22, -230, 10),
        (-23, 20, -100, 11.5),
        (-23, 14, -20, 12),
        (-23, 6, 40, 12.5),
        (-20, 0, 90, 13),
        (-16, -8, 116, 13),
    ]
    aorta: Chain = [(4, 22, -230, 8), (5, 18, -105, 10), (8, 16, -20, 11), (11, 22, 60, 12), (16, 30, 160, 12.5)]
    for name, tissue, chain, factor in (
        ("inferior_vena_cava", "vein", cava, wide[0]),
        ("aorta", "aorta", aorta, wide[1]),
    ):
        scaled = [(x, y, z, r * factor) for x, y, z, r in _moved(rng, chain, 2, 0.0)]
        box, f = c.tube(scaled)
        c.paint(box, f, p.hu[tissue], LABEL[name])


def _spine(c: Canvas, p: Patient) -> None:
    """Vertebral bodies and discs, canal, arch and processes, every 32 mm."""
    rng = p.rng("spine")
    box = c.box((-46, 20, -999), (46, 118, 999))
    label, bone, wide = LABEL["spine"], 0.62 * p.hu["cortical_bone"], rng.uniform(0.93, 1.08)
    x, y, z = c.x[box], c.y[box], c.z[box]
    y = y - 48 - 5 * np.square((z + 40) / 100)
    along = np.mod(z - rng.uniform(0, 32) + 16, 32) - 16
    waist = 1 - 0.09 * np.cos(np.clip(along / 13, -1, 1) * np.pi / 2)
    body = ((np.abs(x / (22.5 * wide)) ** 2.5 + np.abs(y / (17 * wide)) ** 2.5) ** np.float32(0.4) / waist - 1) * 18
    c.paint(box, body + 1, p.hu["disc"], label)
    ends = np.abs(along) - 12.5
    shell = np.where(body > -2.5, 0.8, 0.5).astype(np.float32)  # an end plate is thinner than a slice
    c.paint(box, np.maximum(body, ends), shell * p.hu["cortical_bone"], label)
    c.paint(box, np.maximum(body, ends) + 2, p.hu["marrow"] + 16 * c.mottle[box], label)
    canal = (np.hypot(x / 11.5, (y - 25) / 9) - 1) * 10
    tilted = np.abs(along + 3 + 0.25 * (y - 25))
    c.paint(box, np.maximum(canal - 6, tilted - 10), bone, label)
    wings = np.maximum.reduce([np.abs(y - 24 + 0.1 * np.abs(x)) - 4.5, np.abs(x) - 38, np.abs(along) - 6])
    c.paint(box, wings, bone, label)
    thorn = np.maximum.reduce([np.abs(x) - 3.6, np.abs(y - 41) - 11, np.abs(along + 7) - 9])
    c.paint(box, thorn, bone, label)
    c.paint(box, canal, p.hu["visceral_fat"] * 0.3)
    c.paint(box, (np.hypot(x, y - 25) - 6.5), p.hu["cord"])


def _ribs(c: Canvas, p: Patient, cage: Array) -> None:
    """Ribs fall from back to front within the wall, 27 mm apart; the lower ones end earlier and go on as cartilage."""
    angle = np.arctan2(np.abs(c.x), c.y + 4) / np.float32(np.pi)  # 0 at the back, 1 at the front
    height = c.z + 105 * angle + 36 + p.rng("ribs").normal(0, 5)
    number = np.floor(height / 27)
    across = height - 27 * (number + 0.5)
    rib = (np.hypot((cage - 6) / 3.9, across / 6.2) - 1) * 5
    end = np.minimum(0.34 + 0.12 * number, 0.8)
    rib = np.maximum.reduce([rib, 26 - np.abs(c.x), -30 * (number + 0.5)])
    c.paint(c.all, np.maximum(rib, 250 * (angle - end)), 0.8 * p.hu["cortical_bone"])
    c.paint(c.all, np.maximum(rib, 250 * (angle - end)) + 1.8, p.hu["marrow"] + 60)
    gristle = np.maximum.reduce([rib, 250 * (end - angle), 250 * (angle - end - 0.2), 1.5 - number])
    c.paint(c.all, gristle, p.hu["disc"] + 20)
