"""Damaged files of every format, and a child process that reads them with little memory and little time.

`python -c "from tests.data_curation.fuzzing import main; main()" FOLDER KIND FIRST LAST` prints a line of JSON for each
file; a crash, a hang or a large allocation ends it early, and what it last named is the culprit.
"""

from __future__ import annotations

import bz2
import gzip
import json
import random
import re
import resource
import shutil
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_curation.volumes import VolumeError, find, read
from tests.data_curation import test_metaimage, test_nrrd
from tests.data_curation.test_dicom import slice_at, write
from tests.data_curation.test_nifti import LPS_SFORM, header

HEADROOM = 256 << 20  # bytes that reading one small file may take
SECONDS = 20
HU = np.random.default_rng(5).integers(-1000, 1500, (6, 9, 12)).astype("<i2")
RAW = HU.tobytes()
Files = dict[str, bytes]


def _second() -> bytes:
    raw = bytearray(544)
    struct.pack_into("<i8s", raw, 0, 540, b"n+2\0\r\n\x1a\n")
    struct.pack_into("<hh8q", raw, 12, 4, 16, 3, 12, 9, 6, 1, 1, 1, 1)
    struct.pack_into("<8d", raw, 104, 1, 0.8, 0.7, 2.5, 0, 0, 0, 0)
    struct.pack_into("<q", raw, 168, 544)
    struct.pack_into("<2i", raw, 344, 0, 1)
    struct.pack_into("<12d", raw, 400, *np.ravel(LPS_SFORM))
    return bytes(raw)


def bases() -> dict[str, list[Files]]:
    """Small whole images of each kind; the first file of each is the one that is damaged most."""
    one = header((12, 9, 6), sform=LPS_SFORM)
    turned = header((12, 9, 6), qform=(0.1, 0.2, 0.9, 1, 2, 3), slope=2.0, inter=-1024.0)
    pair = header((12, 9, 6), sform=LPS_SFORM, magic=b"ni1\0", offset=0.0)[:348]
    nrrd, meta = test_nrrd.header, test_metaimage.header
    sizes = {"sizes": "12 9 6"}
    dims = {"DimSize": "12 9 6"}
    packed = zlib.compress(RAW)
    slices = {f"s{i}.raw": HU[i].tobytes() for i in range(6)}
    named = "\n".join(slices)
    return {
        "nifti1": [{"ct.nii": one + RAW}, {"ct.nii": turned + RAW}, {"ct.nii.gz": gzip.compress(one + RAW, mtime=0)}],
        "nifti2": [{"ct.nii": _second() + RAW}, {"ct.nii.gz": gzip.compress(_second() + RAW, mtime=0)}],
        "pair": [{"ct.hdr": pair, "ct.img": RAW}, {"ct.hdr": pair, "ct.img.gz": gzip.compress(RAW, mtime=0)}],
        "nrrd": [
            {"ct.nrrd": nrrd(**sizes) + b"\n" + RAW},
            {"ct.nrrd": nrrd(**sizes, encoding="gzip") + b"\n" + gzip.compress(RAW, mtime=0)},
            {"ct.nrrd": nrrd(**sizes, encoding="bzip2") + b"\n" + bz2.compress(RAW)},
            {"ct.nrrd": nrrd(**sizes, encoding="ascii") + b"\n" + " ".join(map(str, HU.ravel())).encode()},
            {"ct.nrrd": nrrd(**sizes, encoding="hex", line_skip="1", byte_skip="1") + b"\n\nx" + RAW.hex().encode()},
        ],
        "nhdr": [
            {"ct.nhdr": nrrd(**sizes, data_file="v.raw"), "v.raw": RAW},
            {"ct.nhdr": nrrd(**sizes, data_file=f"LIST\n{named}"), **slices},
            {"ct.nhdr": nrrd(**sizes, data_file="s%d.raw 0 5 1"), **slices},
        ],
        "mha": [
            {"ct.mha": meta(**dims) + RAW},
            {"ct.mha": meta(**dims, CompressedData="True", CompressedDataSize=str(len(packed))) + packed},
            {"ct.mha": meta(**dims, BinaryData="False") + " ".join(map(str, HU.ravel())).encode()},
        ],
        "mhd": [
            {"ct.mhd": meta("v.raw", **dims, HeaderSize="-1"), "v.raw": b"xyz" + RAW},
            {"ct.mhd": meta("v.zraw", **dims, CompressedData="True"), "v.zraw": packed},
            {"ct.mhd": meta(f"LIST\n{named}", **dims), **slices},
            {"ct.mhd": meta("s%d.raw 0 5 1", **dims), **slices},
        ],
    }


def _flip(raw: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 4, 30))):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def _flip_header(raw: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 2, 5))):
        raw[draw.randrange(min(len(raw), 350))] = draw.choice((0, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return bytes(raw)


def _cut(raw: bytearray, draw: random.Random) -> bytes:
    return bytes(raw[: draw.randrange(len(raw))])


def _zeroed(raw: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    length = min(draw.randrange(1, 200), len(raw) - start)
    raw[start : start + length] = bytes(length)
    return bytes(raw)


def _doubled(raw: bytearray, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(raw)), draw.randrange(1, 400)
    raw[start:start] = raw[start : start + length]
    return bytes(raw)


def _lost(raw: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    del raw[start : start + draw.randrange(1, 100)]
    return bytes(raw)


def _swapped(raw: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(0, max(1, min(len(raw), 544) - 8), 2)
    raw[start : start + 4], raw[start + 4 : start + 8] = raw[start + 4 : start + 8], raw[start : start + 4]
    return bytes(raw)


_EXTREMES = (
    "0", "-1", "1", "2", "3", "nan", "inf", "-inf", "1e300", "-1e-300", "99999", "20000000", "2147483648", "9" * 18,
    "9" * 5000, "", "none", "x", "True", "float", "double", "uchar", "MET_DOUBLE", "MET_CHAR", "raw", "gzip", "bz2",
    "hex", "ascii", "LOCAL", "LIST", "../v.raw", "%d", "s%d.raw 0 9 3", "(0,0,0)", "(nan,1,1)", "\0", "é",
)  # fmt: skip


def _extreme(raw: bytearray, draw: random.Random) -> bytes:
    """A number of the header at an end of its range: in text a word, in NIfTI a field."""
    if raw[:4] == b"NRRD" or raw[:10] == b"ObjectType":
        words = list(re.finditer(rb"[^\s:=,()]+", bytes(raw[:400])))
        word = draw.choice(words[1:] or words)
        raw[word.start() : word.end()] = draw.choice(_EXTREMES).encode()
        return bytes(raw)
    return _binary_extreme(raw, draw)


def _binary_extreme(raw: bytearray, draw: random.Random) -> bytes:
    packed = raw[:2] == b"\x1f\x8b"
    if packed:
        raw = bytearray(gzip.decompress(bytes(raw)))
    second = len(raw) > 540 and raw[4:7] == b"n+2"
    if draw.random() < 0.2:  # a volume of 2 GB
        form, at = ("<3q", 24) if second else ("<3h", 42)
        struct.pack_into(form, raw, at, 1000, 1000, 1000)
        return gzip.compress(bytes(raw), mtime=0) if packed else bytes(raw)
    if draw.random() < 0.5:  # a length of an axis, or their number
        form, at = ("<q", 16 + 8 * draw.randrange(8)) if second else ("<h", 40 + 2 * draw.randrange(8))
        value = draw.choice((0, -1, 1, 2, 4, 7, 100, 32767, -32768, *((2**40, 2**62) if second else ())))
    else:
        form, fields = ("<d", (104, 200)) if second else ("<f", (76, 124))
        places = (
            *range(*fields, struct.calcsize(form)),
            *range(*((352, 496) if second else (256, 328)), struct.calcsize(form)),
        )
        at, value = (
            draw.choice(places),
            draw.choice((0, -1, float("nan"), float("inf"), 1e38, 1e-38, -1e30, 352, 2**31)),
        )
    if at + 8 <= len(raw):
        struct.pack_into(form, raw, at, value)
    return gzip.compress(bytes(raw), mtime=0) if packed else bytes(raw)


def _bomb(raw: bytearray, draw: random.Random) -> bytes:
    """400 MB behind the voxels that were promised, in some hundred kilobytes."""
    text = bytes(raw)
    if text[:2] == b"\x1f\x8b":
        return _deflated(gzip.decompress(text), 31)
    for magic, bits in ((b"\n\n\x1f\x8b", 31), (b"LOCAL\n\x78\x9c", 15)):
        head, found, _ = text.partition(magic)
        if found:
            return head + magic[:-2] + _deflated(RAW, bits)
    head, found, _ = text.partition(b"\n\nBZh")
    if found:
        return head + b"\n\n" + bz2.compress(RAW) + bz2.compress(bytes(8_000_000)) * 50
    return _deflated(RAW, 15) if text[:2] == b"\x78\x9c" else _deflated(text, 31)


def _deflated(content: bytes, bits: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, bits)
    start = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + (packer.compress(bytes(8_000_000)) + packer.flush(zlib.Z_FULL_FLUSH)) * 50


_DAMAGES: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    _flip, _flip_header, _cut, _zeroed, _doubled, _lost, _swapped, _extreme, _extreme, _bomb,
)  # fmt: skip


def damaged(kind: str, seed: int) -> tuple[Files, str]:
    """The files of one damaged image, and what was done to it. `seed` walks through the damages in turn."""
    draw = random.Random(f"{kind} {seed}")
    files = dict(draw.choice(bases()[kind]))
    names = list(files)
    name = names[0] if draw.random() < 0.7 else draw.choice(names)
    first = _DAMAGES[seed % len(_DAMAGES)]
    done = [first, *([draw.choice(_DAMAGES)] if draw.random() < 0.2 else [])]
    done = list(dict.fromkeys(done))
    done.sort(key=(_extreme, _bomb, *_DAMAGES).index)  # those that must unpack what they damage come first
    for damage in done:
        if files[name]:
            files[name] = damage(bytearray(files[name]), draw)
    return files, f"{kind} {seed}: {', '.join(damage.__name__ for damage in done)} in {name}"


def _dicom(folder: Path, seed: int) -> str:
    draw = random.Random(f"dicom {seed}")
    write(folder, *(slice_at(z) for z in (0.0, 5.0, 10.0)))
    path = draw.choice(sorted(folder.iterdir()))
    damage = draw.choice((_flip, _cut, _zeroed, _doubled, _lost))
    path.write_bytes(damage(bytearray(path.read_bytes()), draw))
    return f"dicom {seed}: {damage.__name__}"


def main() -> None:
    """Reads damaged images FIRST to LAST of KIND, each in `FOLDER`; what each came to goes out as a line of JSON."""
    folder, kind, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    _outcomes(folder, [dict(base) for base in bases().get(kind, [])])  # imports what reading needs
    warnings.simplefilter("error")
    held = int(re.findall(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + HEADROOM, held + HEADROOM))
    for seed in range(first, last):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "dicom":
            what = _dicom(folder, seed)
        else:
            files, what = damaged(kind, seed)
            for name, content in files.items():
                (folder / name).write_bytes(content)
        print(json.dumps({"what": what}), flush=True)
        signal.alarm(SECONDS)
        outcomes = _read(folder)
        signal.alarm(0)
        print(json.dumps({"what": what, "outcomes": outcomes}), flush=True)


def _outcomes(folder: Path, images: list[Files]) -> None:
    for files in images:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert _read(folder)[0][0] == "", files.keys()


def _read(folder: Path) -> list[tuple[str, str]]:
    """For each image found: "" and its size, or the reason and the sentence."""
    outcomes = []
    for found in find(folder):
        try:
            outcomes.append(("", str(read(found).hu.shape)))
        except VolumeError as error:
            outcomes.append((error.reason, error.message))
        except Exception as error:  # what must not happen is reported by name
            outcomes.append((f"!{type(error).__name__}", str(error)[:300]))
    return outcomes
