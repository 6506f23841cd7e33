"""Curation end to end from .nii.gz: `python -m tests.benchmarks.bench_curation [FOLDER OF NIFTI SCANS]`.

Against two others in the same run, on the same files, in CPU time of one thread, a slice:
- the straightforward pipeline: SimpleITK reads and orients, PIL writes a 16-bit PNG (level 6), tarfile packs it;
- the floor: the fastest library for every step that cannot be left out, and nothing else: libdeflate inflates, OpenJPH
  encodes just the pixels that curation stores, one write puts them on the disk.
Without a folder, phantoms of 512 x 512 pixels are curated. Ratios count; milliseconds are those of the machine. A child
process that curates one volume of `TALL` slices then tells the peak of memory, as a multiple of that volume.
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from data_curation import curate, phantom
from data_curation.corpus import Corpus
from data_curation.curate import Settings, Source
from data_curation.volumes import find
from launch.crew import Workers

ROUNDS = 5
EVERY = 8  # of the straightforward pipeline's slices one in so many is encoded: each takes a tenth of a second
TALL = 400
COPIES = 4  # of every file, so that what a run costs once (30 ms) weighs as little as it does in a corpus


def cpu(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median CPU seconds of a call."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def settings(folder: Path, scans: Path, **more: object) -> Settings:
    given = {"folder": folder, "datasets": [Source(name="folder", root=scans)], "workers": 1, **more}
    return Settings.model_validate(given)


def main(one: Settings) -> None:
    """Curates in this process, so that its CPU time counts."""
    curate.main(one, Workers(0))


def straightforward(files: list[Path], target: Path) -> tuple[float, float, int]:
    """CPU seconds of all reading and of the sampled slices' encoding and packing; how many slices were sampled."""
    reading, encoding, sampled = 0.0, 0.0, 0
    with tarfile.open(target, "w") as tar:
        for path in files:
            start = time.process_time()
            hu = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")).clip(-1024, 3071)
            reading += time.process_time() - start
            start = time.process_time()
            for z in range(0, len(hu), EVERY):
                packed = io.BytesIO()
                Image.fromarray((hu[z] + 1024).astype(np.uint16)).save(packed, "PNG", compress_level=6)
                info = tarfile.TarInfo(f"{path.stem}_{z:05d}.png")
                info.size = packed.tell()
                packed.seek(0)
                tar.addfile(info, packed)
                sampled += 1
            encoding += time.process_time() - start
    return reading, encoding, sampled


def floor(files: list[tuple[bytes, int]], stored: list[NDArray[np.int16]], target: Path) -> None:
    """Inflate all, encode what curation stored, write it."""
    for data, size in files:
        imagecodecs.gzip_decode(data, out=size)
    with open(target, "wb") as file:
        for hu in stored:
            file.write(imagecodecs.htj2k_encode(hu))


CHILD = """
import sys
from pathlib import Path
from tests.benchmarks.bench_curation import main, settings
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
root = Path(sys.argv[1])
main(settings(root / "first", root / "tiny"))  # imports
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = peak()
main(settings(root / "second", root / "tall"))
print(before, peak(), file=sys.stderr)
"""


def peak_of_child(root: Path) -> str:
    """Peak memory of a process that curates one tall volume, above what it held before."""
    for name, depth in (("tiny", 2), ("tall", TALL)):
        image = phantom.make(1, (8, 512, 512), (20.0, 0.75, 0.75)).hu
        scan = sitk.GetImageFromArray(np.concatenate([image] * (depth // 8 + 1))[:depth])
        scan.SetSpacing((0.75, 0.75, 1.0))
        (root / name).mkdir()
        sitk.WriteImage(scan, str(root / name / "ct.nii.gz"), useCompression=True)
    done = subprocess.run([sys.executable, "-c", CHILD, str(root)], capture_output=True, text=True, check=True)
    before, after = map(int, done.stderr.splitlines()[-1].split())
    volume = TALL * 512 * 512 * 2
    return (
        f"memory: a volume of {volume / 1e6:,.0f} MB takes {(after - before) / volume:.2f} times itself "
        f"(peak {after / 1e6:,.0f} MB, {before / 1e6:,.0f} MB of it there before)"
    )


def run(scans: Path, root: Path) -> None:
    chosen = [one.path for one in find(scans) if one.kind == "nifti" and one.path.name.endswith(".nii.gz")]
    scans = root / "copies"
    files = [scans / f"{number}_{copy}.nii.gz" for number in range(len(chosen)) for copy in range(COPIES)]
    scans.mkdir()
    for path in files:
        path.symlink_to(chosen[int(path.name.partition("_")[0])].resolve())
    main(settings(root / "warm-up", scans))  # imports take longer than a small folder
    names = iter(range(ROUNDS))
    seconds = cpu(lambda: main(settings(root / f"made{next(names)}", scans)))
    made = Corpus(root / "made0", None, duplicates=True, frame=False)
    slices = [np.ascontiguousarray(made.hu(i)) for i in range(len(made))]
    raw = [path.read_bytes() for path in files]
    sizes = [int.from_bytes(data[-4:], "little") for data in raw]
    least = cpu(lambda: floor(list(zip(raw, sizes, strict=True)), slices, root / "floor"))
    reading, encoding, sampled = straightforward(files, root / "plain.tar")
    count = len(made)
    plain = reading / count + encoding / sampled
    ours = seconds / count
    print(f"curate: {ours * 1e3:.2f} ms a slice of one core, {1 / ours:.0f} slices/s ({count} slices)")
    print(
        f"straightforward: {plain * 1e3:.1f} ms ({reading / count * 1e3:.1f} of it reading): {plain / ours:.1f} times"
    )
    print(f"floor: {least / count * 1e3:.2f} ms: curation takes {seconds / least:.2f} of it")
    whole = sum(int(np.prod(Corpus(root / "made0", None, duplicates=True).shape(i))) for i in range(count)) * 2
    stored = sum(len(made.encoded(i)) for i in range(count))
    print(
        f"stored: {stored / whole:.3f} of the raw bytes; {sum(hu.nbytes for hu in slices) / whole:.3f} lie in the boxes"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        scans = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "scans"
        if len(sys.argv) < 2:
            phantom.write("folder", scans, range(3), shape=(40, 512, 512), spacing=(3.0, 0.75, 0.75))
        run(scans, root)
        print(peak_of_child(root))
