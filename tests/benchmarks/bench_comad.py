"""What does a student learn from several teachers? python -m tests.benchmarks.bench_comad [CT_FOLDER]

Three small ViTs are pretrained differently (DINO alone, iBOT alone, both under random windows), on phantoms and on the
CT volumes of a folder. Students of the same size are then distilled from them: by the default, with other adapters,
with trained ones (which collapse), without a gate, from one teacher alone. All are probed on labelled phantoms that no
step has seen. The table gives recall of the linear and the k-NN probe, and what the log said of gate and target at the
end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.released import load_backbone
from pretrain.watch.probe import Pair, find_pairs
from tests.benchmarks.bench_recipe import SMALL, axial, prepare, probed

HEAD = "{prototypes: 1024, hidden: 512, bottleneck: 128}"
TERM = f"{{head: {HEAD}, teacher_temperature: 0.02}}"
SHARPER = f"{{head: {HEAD}, teacher_temperature: 0.005}}"  # alone it would stay on the plateau of even targets
CROPS = "global_size: 128, local_size: 64"
TEACHERS = {
    "dino": (f"data.crops={{{CROPS}, n_local: 4}}", f"method.terms.dino={TERM}", "method.terms.ibot=null"),
    "ibot": (
        f"data.crops={{{CROPS}, n_local: 0}}", f"method.terms.ibot={SHARPER}", "method.terms.dino=null",
        "method.terms.koleo=null",
    ),
    "window": (
        f"data.crops={{{CROPS}, n_local: 4, random_window: {{}}}}", f"method.terms.dino={TERM}",
        f"method.terms.ibot={TERM}",
    ),
}  # fmt: skip
STUDENTS = {
    "three teachers, the default (gcca)": (),
    "pca": ("method.adapter.kind=pca",),
    "reconstruction": ("method.adapter.kind=recon",),
    "joint, as published": ("method.adapter.kind=joint", "method.masks={nested: false, replace: true}"),
    "no gate: plain average": ("method.gate={affinity: 0, agreement: 0}",),
    "gcca, not spread over the channels": ("method.adapter.spread=false",),
    **{
        f"{name} alone": tuple(f"method.teachers.{other}=null" for other in TEACHERS if other != name)
        for name in TEACHERS
    },
}
COMMON = (
    "model={size: custom, width: 128, depth: 6, heads: 4, in_channels: 1, drop_path: 0, layerscale: null}",
    *(word for word in SMALL if not word.startswith(("model", "method", "data.batch_size"))),
)
NUMBERS = ("gate/target_std", "gate/entropy")


def teach(root: Path, corpus: Path, steps: int) -> dict[str, Path]:
    """The teachers' runs by name; those that are there already are taken."""
    runs = {name: root / f"teacher_{name}" for name in TEACHERS}
    for seed, (name, words) in enumerate(TEACHERS.items(), start=1):
        axial(
            "pretrain", "stage1.yaml", f"folder={runs[name]}", f"steps={steps}", f"data.corpus={corpus}",
            *COMMON, "data.batch_size=16", *words, f"seed={seed}", f"data.seed={seed}",
            "method.momentum=0.98", "optim.lr={peak: 1e-3, warmup: 0.1, end: 1e-5}", "init_from=scratch",
        )  # fmt: skip
    return runs


def distil(root: Path, corpus: Path, teachers: dict[str, Path], steps: int, chosen: Sequence[str]) -> dict[str, Path]:
    """The students' runs by what they are."""
    runs = {}
    for number, (name, words) in enumerate(STUDENTS.items()):
        if chosen and not any(word in name for word in chosen):
            continue
        runs[name] = root / f"student_{number}"
        axial(
            "pretrain", "comad_ct.yaml", f"folder={runs[name]}", f"steps={steps}", f"data.corpus={corpus}",
            *COMMON, "data.batch_size=32",
            "data.crops={global_size: 128, n_global: 1, n_local: 0, global_scale: [0.2, 1]}",
            *(f"method.teachers.{n}=null" for n in ("meddinov3", "axial", "dinov3")),
            *(f"method.teachers.{n}={{kind: axial, weights: {run}}}" for n, run in teachers.items()),
            "optim.lr={peak: 2e-3, warmup: 0.1, end: 1e-5}", *words,
        )  # fmt: skip
    return runs


def last_numbers(run: Path) -> dict[str, float]:
    """What the last lines of a run's log said, a mean over five of them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if NUMBERS[0] in row][-5:]
    names = [name for name in rows[0] if name.startswith("gate/")] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def table(runs: dict[str, Path], pairs: Sequence[Pair]) -> None:
    """Print one line a backbone."""
    rows = {}
    for name, run in runs.items():
        backbone, window = load_backbone(run, say=lambda _: None)
        rows[name] = probed(backbone, window, pairs), last_numbers(run)
    torch.manual_seed(0)
    backbone.init_weights()
    rows = {"random weights": (probed(backbone, window, pairs), {})} | rows
    names = list(rows["random weights"][0])
    print(f"\n{'recall of probes':<38}" + "".join(f"{name:>16}" for name in names) + "  target_std  entropy  weights")
    for name, (scores, numbers) in rows.items():
        weights = [f"{key.split('/')[-1]} {value:.2f}" for key, value in numbers.items() if "/weight/" in key]
        said = "".join(f"{numbers[key]:>10.2f}" for key in NUMBERS if key in numbers)
        print(f"{name:<38}" + "".join(f"{scores[n]:>16.3f}" for n in names) + f"  {said}  {' '.join(weights)}")


def main() -> None:
    """Run what is not there yet, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("scans", nargs="?", type=Path)
    options.add_argument("--folder", type=Path, default=None)
    options.add_argument("--steps", type=int, nargs=2, default=[500, 400], help="of a teacher, of a student")
    options.add_argument("--only", nargs="*", default=[], help="words in the names of the students to train")
    given = options.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="axial-comad-"))
    root.mkdir(parents=True, exist_ok=True)
    corpus, labelled = prepare(root, given.scans)
    start = time.monotonic()
    teachers = teach(root, corpus, given.steps[0])
    students = distil(root, corpus, teachers, given.steps[1], given.only)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes")
    named = {f"teacher: {name}": run for name, run in teachers.items()}
    table(named | students, find_pairs(labelled / "imagesTr", labelled / "labelsTr"))


if __name__ == "__main__":
    main()
