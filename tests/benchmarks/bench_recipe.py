"""Do the three stages teach a backbone anything? python -m tests.benchmarks.bench_recipe [CT_FOLDER] [--seeds 0 1 2]

A ViT-Ti is pretrained by stage1.yaml, stage2_gram.yaml and stage3_hires.yaml, cut down to crops of 128 and 64 pixels
and to a few hundred steps, on phantoms and on the CT volumes of a folder, once for each seed, by the commands that a
user types. Random weights and those of each stage are then probed on labelled phantoms that no step has seen, at the
size of the crops and at twice that. With --control a second stage without the Gram term is run beside the other, which
tells what that term did.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch

from data_curation import phantom
from launch import cli
from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer
from pretrain.released import load_backbone
from pretrain.watch.probe import Pair, ProbeSettings, find_pairs, probe

HEAD = "{prototypes: 1024, hidden: 512, bottleneck: 128}"
TEMPERATURE = 0.02  # below the published one: short runs would stay on the plateau at ln(prototypes)
SMALL = (
    "precision=fp32", "parallel={compile: false, recompute: none}", "data.batch_size=16", "data.workers=0",
    "model={size: ti, in_channels: 1, drop_path: 0, layerscale: null}",
    f"method.terms.dino={{head: {HEAD}, teacher_temperature: {TEMPERATURE}}}",
    f"method.terms.ibot={{head: {HEAD}, teacher_temperature: {TEMPERATURE}}}",
    "optim.lr_rule=none", "optim.freeze_last_layer=0", "optim.layer_decay=1", "optim.patch_embed_lr=1",
    "log.every=20", "checkpoint.every=1000", "checkpoint.keep_every=0", "watch.every=0", "watch.images_every=0",
)  # fmt: skip
ORGANS = ("liver", "spleen", "kidney_right", "kidney_left", "stomach", "aorta", "inferior_vena_cava", "spine", "lungs")
RANDOM = "random weights"
SIZES = (128, 256)  # pixels of the longer side that the probe sees: that of the crops, and twice that


def axial(*words: object) -> None:
    """Show and run one command."""
    line = [str(word) for word in words]
    print(f"$ axial {shlex.join(line)}", flush=True)
    if code := cli.main(line):
        raise SystemExit(code)


def prepare(root: Path, scans: Path | None) -> tuple[Path, Path]:
    """The corpus, and labelled phantoms of other patients."""
    corpus, labelled = root / "corpus", root / "Dataset001_Probe"
    if not (labelled / "dataset.json").exists():
        phantom.write("folder", root / "phantoms", list(range(1000, 1024)), (40, 160, 160))
        phantom.write("nnunet", labelled, list(range(5000, 5016)), (32, 192, 192), organs=ORGANS, tests=0)
    lines = ["datasets:", f"  - {{name: folder, id: phantoms, root: {root / 'phantoms'}}}"]
    lines += [f"  - {{name: folder, id: scans, root: {scans}}}"] if scans else []
    (root / "corpus.yaml").write_text("\n".join(lines) + "\n")
    axial("curate", root / "corpus.yaml", f"folder={corpus}")
    return corpus, labelled


def probed(backbone: VisionTransformer, window: HuWindow, pairs: Sequence[Pair]) -> dict[str, float]:
    """Recall of both probes by "size|probe"; the more slices, the less chance there is in it."""
    found: dict[str, float] = {}
    for size in SIZES:
        scores = probe(backbone, window, pairs, ProbeSettings(size=size, slices=16))
        found |= {f"{size} px|{name}": scores[f"{name}/recall"] for name in ("linear", "knn")}
    return found


def train(root: Path, corpus: Path, seed: int, steps: list[int], control: bool) -> tuple[dict[str, Path], float]:
    """All runs of one seed by what they are, and the minutes that the three stages took."""
    runs = root / f"seed{seed}"
    one, two, three, free = (runs / name for name in ("stage1", "stage2", "stage3", "stage2_without_gram"))
    common = (*SMALL, f"data.corpus={corpus}", f"seed={seed}", f"data.seed={seed}")
    crops = "global_size: 128, local_size: 64, n_local: 4"
    first = ("method.momentum=0.98", f"data.crops={{{crops}}}", "optim.lr={peak: 1e-3, warmup: 0.1, end: 1e-5}")
    lower = "optim.lr={peak: 2.5e-4, warmup: 0.1, end: 1e-5}"
    second = (f"init_from={one}", "method.momentum=0.99", f"data.crops={{{crops}, gram_size: 256}}", lower)
    anchor = f"method.gram_teacher={{path: {one}, step: null}}"
    mix = (
        "data.crops={n_local: 4, mix: [{global_size: 160, local_size: 64, gram_size: 256, probability: 0.5}, "
        "{global_size: 192, local_size: 80, gram_size: 256, probability: 0.5}]}"
    )
    last = (f"init_from={two}", "method.momentum=0.99", mix, "optim.lr={peak: 1.25e-4, warmup: 0.1, end: 1e-5}")
    start = time.monotonic()
    axial("pretrain", "stage1.yaml", f"folder={one}", f"steps={steps[0]}", *common, *first, "init_from=scratch")
    axial("pretrain", "stage2_gram.yaml", f"folder={two}", f"steps={steps[1]}", *common, *second, anchor)
    axial("pretrain", "stage3_hires.yaml", f"folder={three}", f"steps={steps[2]}", *common, *last, anchor)
    minutes = (time.monotonic() - start) / 60
    found = {"after stage 1": one, "after stage 2": two, "after stage 3": three}
    if control:
        alone = ("method.terms.gram=null", "method.gram_teacher=null")
        axial("pretrain", "stage2_gram.yaml", f"folder={free}", f"steps={steps[1]}", *common, *second, *alone)
        found["after stage 2 without Gram"] = free
    return found, minutes


def scores(runs: dict[str, Path], seed: int, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """What random weights and each run score."""
    found: dict[str, dict[str, float]] = {RANDOM: {}}
    for when, run in runs.items():
        backbone, window = load_backbone(run)
        found[when] = probed(backbone, window, pairs)
    torch.manual_seed(seed)
    backbone.init_weights()
    return found | {RANDOM: probed(backbone, window, pairs)}


def main() -> None:
    """Print one line a state of the backbone: mean and deviation over the seeds, and the margin over random weights."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("scans", nargs="?", type=Path)
    options.add_argument("--folder", type=Path, default=None)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, nargs=3, default=[400, 80, 40])
    options.add_argument("--control", action="store_true")
    given = options.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="axial-recipe-"))
    root.mkdir(parents=True, exist_ok=True)
    corpus, labelled = prepare(root, given.scans)
    pairs = find_pairs(labelled / "imagesTr", labelled / "labelsTr")
    table, minutes = [], []
    for seed in given.seeds:
        runs, took = train(root, corpus, seed, given.steps, given.control)
        table.append(scores(runs, seed, pairs))
        minutes.append(took)
    print(f"\nminutes of the three stages: {', '.join(f'{m:.1f}' for m in minutes)}")
    for name in table[0][RANDOM]:
        print(f"{name}: mean recall of {len(table)} seeds (deviation), margin over random weights of each seed")
        for when in table[0]:
            values = [row[when][name] for row in table]
            margins = [row[when][name] - row[RANDOM][name] for row in table]
            spread = stdev(values) if len(values) > 1 else 0.0
            print(f"  {when:<28}{mean(values):.3f} ({spread:.3f})  {'  '.join(f'{m:+.3f}' for m in margins)}")


if __name__ == "__main__":
    main()
