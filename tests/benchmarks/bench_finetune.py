"""What a pretrained backbone brings on real CT: python -m tests.benchmarks.bench_finetune CT_FOLDER --backbone FILE

Two data sets are made of labelled scans: ten soft-tissue sarcomas drawn by hand (`sts_gtv`, five folds), and a chest
and an abdomen whose labels are brought to nine organs that both have (`lidc0001_chest`, `ts_example`: two folds, each
patient is predicted by what learnt from the other). Every arm trains for the same steps on the same batches, from the
same seeds, and its label maps of the held-out cases are scored on the scans' own grids:

scratch      the backbone from random weights, all of it trained
frozen       the pretrained backbone as it is, only the decoder is trained
lora, full   the pretrained backbone with LoRA, and all of it trained, at a tenth of the decoder's rate
fast         the pretrained backbone, all of it trained at the decoder's rate, which is that of scratch
unet         MONAI's plain 2D U-Net, as wide as makes its training step about as long

The backbone must not have seen these scans. Fold by fold the cases of all seeds are scored; `axial compare` gives the
paired tests between the arms.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from downstream.cases import open_dataset, split
from downstream.decoders import pyramid
from downstream.evaluate import Settings as EvaluateSettings
from downstream.evaluate import main as evaluate
from downstream.finetune import Settings as FinetuneSettings
from downstream.geometry import found_at, from_lps, write_labelmap
from downstream.images import read_image
from downstream.inference import Window, predict_volume
from downstream.losses import SegmentationLoss
from downstream.model import Header
from downstream.prepared import channel_windows, prepare
from downstream.segmentation import Source, batches
from launch import cli
from launch.distributed import World
from launch.settings import load
from pretrain.models.vit import VitSettings

ORGANS = {
    "liver": ("liver",),
    "spleen": ("spleen",),
    "kidney_right": ("kidney_right",),
    "kidney_left": ("kidney_left",),
    "stomach": ("stomach",),
    "aorta": ("aorta",),
    "spine": ("vertebrae",),
    "lungs": ("lung",),
    "back_muscles": ("autochthon",),
}
ARMS = ("scratch", "frozen", "lora", "full", "fast", "unet")
HERE = World(0, 1, 0, torch.device("cpu"))
SETS = {  # spacing, patch, folds
    "sarcoma": (None, 160, 5),
    "organs": (1.5, 224, 2),
}
TUNING = {"scratch": "full", "frozen": "frozen", "lora": "lora", "full": "full"}


def axial(*words: object) -> None:
    """Show and run one command."""
    line = [str(word) for word in words]
    print(f"$ axial {shlex.join(line)}", flush=True)
    if code := cli.main(line):
        raise SystemExit(code)


def sarcoma(scans: Path, folder: Path) -> None:
    """Ten patients, one label: links into the folder of scans."""
    cases = sorted((scans / "sts_gtv").iterdir())
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in cases:
        for source, target in (("CT_image", f"imagesTr/{case.name}_0000"), ("CT_mask", f"labelsTr/{case.name}")):
            link = folder / f"{target}.nii.gz"
            link.unlink(missing_ok=True)
            link.symlink_to((case / f"{source}.nii.gz").resolve())
    describe(folder, {"tumour": 1}, len(cases))


def organs(scans: Path, folder: Path) -> None:
    """Two patients, labels of nine organs that both have."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pairs = {"chest_1": ("lidc0001_chest", "ct", "seg"), "abdomen_2": ("ts_example", "ct", "ct_seg")}
    for case, (source, image, label) in pairs.items():
        link = folder / f"imagesTr/{case}_0000.nii.gz"
        link.unlink(missing_ok=True)
        link.symlink_to((scans / source / f"{image}.nii.gz").resolve())
        names = json.loads((scans / source / f"{label}_labels.json").read_text())
        table = np.zeros(256, np.uint8)
        for value, prefixes in enumerate(ORGANS.values(), 1):
            table[[number for name, number in names.items() if name.startswith(prefixes)]] = value
        stored = sitk.ReadImage(str(scans / source / f"{label}.nii.gz"))
        made = sitk.GetImageFromArray(table[sitk.GetArrayFromImage(stored).astype(np.int64)])
        made.CopyInformation(stored)
        sitk.WriteImage(made, str(folder / f"labelsTr/{case}.nii.gz"), True)
    describe(folder, {organ: value for value, organ in enumerate(ORGANS, 1)}, len(pairs))


def describe(folder: Path, labels: dict[str, int], count: int) -> None:
    """dataset.json of version 2."""
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **labels}, "numTraining": count}
    (folder / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))


def words(name: str, arm: str, given: argparse.Namespace, seed: int, fold: int | str) -> list[object]:
    """What every arm is trained with, as settings of `axial finetune`."""
    spacing, patch, folds = SETS[name]
    own = ["model={size: ti, in_channels: 1, layerscale: null}"] if arm == "scratch" else [f"backbone={given.backbone}"]
    rates = f"{{lr: 1e-3, backbone_lr: {'1e-3' if arm in ('scratch', 'fast') else '1e-4'}}}"
    return [
        *own, f"folder={given.folder / name / f'{arm}_{seed}'}", f"dataset={given.folder / f'Dataset_{name}'}",
        f"cache={given.folder / name / 'cache'}", f"tuning={{kind: {TUNING.get(arm, 'full')}}}", f"seed={seed}",
        f"spacing={'null' if spacing is None else spacing}", f"split={{folds: {folds}, fold: {fold}}}",
        f"patches={{size: {patch}, batch_size: {given.batch}, workers: 1}}", f"steps={given.steps}", f"optim={rates}",
        "decoder={kind: pyramid}", "drop_path=0", "precision=fp32", "validate_every=0", "device=cpu",
        "augmentation={flip: [], rotate_degrees: 30}", f"log.every={max(given.steps // 5, 1)}",
        f"checkpoint.every={given.steps}",
    ]  # fmt: skip


class Plain(nn.Module):
    """A network that sees one slice, in the place of a backbone and its decoder."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """[B, 1, H, W] -> logits [B, heads, H, W]."""
        logits: Tensor = self.network(image)
        return logits


def unet(heads: int, width: int) -> Plain:
    """MONAI's residual-free U-Net of five levels, each twice as wide as the one above up to sixteen times."""
    from monai.networks.nets import UNet

    channels = [width * 2**level for level in range(5)]
    return Plain(UNet(2, 1, heads, channels, strides=[2] * 4, num_res_units=0, norm="instance"))


def train_unet(name: str, given: argparse.Namespace, seed: int, fold: int, target: Path) -> None:
    """Trains on what `finetune` would, and writes the label maps of the fold's cases to `target`."""
    overrides = [str(word) for word in words(name, "unet", given, seed, fold)]
    settings = load(FinetuneSettings, None, overrides)
    dataset = open_dataset(settings.dataset)
    training, validation = split([case.name for case in dataset.cases], settings.split)
    assert settings.cache is not None
    cases = {case.name: case for case in prepare(dataset.cases, dataset.labels, settings.spacing, settings.cache)}
    channels = channel_windows([cases[n] for n in training], dataset.channels)
    torch.manual_seed(seed)
    network = unet(len(dataset.labels.heads), given.width)
    source = Source(
        [cases[n] for n in training], settings.patches, settings.augmentation, channels, settings.context, seed
    )
    fit(network, source, SegmentationLoss(dataset.labels), given.steps)
    header = Header(
        vit=VitSettings(size="ti", in_channels=1),
        decoder=pyramid.Settings(),
        organs=dict(dataset.labels.organs),
        values=dataset.labels.values,
        channels=channels,
        spacing=settings.spacing,
        patch=settings.patches.size,
    )
    for case in dataset.cases:
        if case.name in validation:
            found = read_image([found_at(path) for path in case.images], ["ct"], dataset.channels)
            spacing = found.scan.volume.spacing
            labels = predict_volume([network.eval()], header, found.stored, spacing, Window())  # type: ignore[list-item]
            write_labelmap(
                target / f"{case.name}.nii.gz", from_lps(labels, found.scan.own), found.scan.own, case.images[0]
            )


def fit(network: nn.Module, source: Source, loss: SegmentationLoss, steps: int) -> None:
    """The optimizer of `finetune` at the rate of its decoder, on the same batches."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    stream = batches(source, HERE, 0)
    network.train()
    for _ in range(steps):
        batch = next(stream)
        optimizer.zero_grad()
        sum(loss(network(batch.images), batch.labels).values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        fall.step()
    stream.close()
    network.requires_grad_(False)


def scored(name: str, arm: str, given: argparse.Namespace, seed: int) -> tuple[Path, float]:
    """Trains and predicts every fold of one arm; the folder of its scores, and the seconds it took."""
    folder, folds = given.folder / name / f"{arm}_{seed}", SETS[name][2]
    start = time.monotonic()
    if arm != "unet":
        axial("finetune", *words(name, arm, given, seed, "all"))
        return folder / "scores", time.monotonic() - start
    maps = folder / "validation"
    maps.mkdir(parents=True, exist_ok=True)
    for fold in range(folds):
        train_unet(name, given, seed, fold, maps)
    labels = given.folder / f"Dataset_{name}" / "labelsTr"
    evaluate(EvaluateSettings(folder=folder / "scores", predictions=maps, labels=labels))
    return folder / "scores", time.monotonic() - start


def table(name: str, arms: Sequence[str], given: argparse.Namespace) -> None:
    """One line an arm: Dice, NSD and HD95, mean over seeds (spread over seeds of Dice)."""
    lines = []
    for arm in arms:
        runs = [scored(name, arm, given, seed) for seed in given.seeds]
        means = [json.loads((folder / "summary.json").read_text())["organs"]["mean"] for folder, _ in runs]
        dice = [row["dice"]["mean"] for row in means]
        nsd, hd95 = (np.mean([row[key]["mean"] or math.nan for row in means]) for key in ("nsd", "hd95"))
        seconds = np.mean([took for _, took in runs])
        spread = f"{min(dice):.3f} to {max(dice):.3f}" if len(dice) > 1 else ""
        lines.append(f"  {arm:10}{np.mean(dice):8.3f}  {spread:16}{nsd:8.3f}{hd95:9.1f}{seconds:9.0f}")
    print(f"\n{name}: {'arm':8}{'Dice':>4}  {'seeds':16}{'NSD':>8}{'HD95 mm':>9}{'seconds':>9}")
    print("\n".join(lines), flush=True)


def main() -> None:
    """Print a table for each data set."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("scans", type=Path)
    options.add_argument("--backbone", type=Path, required=True)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--batch", type=int, default=6)
    options.add_argument("--width", type=int, default=48, help="channels of the U-Net's first level")
    given = options.parse_args()
    makers: dict[str, Callable[[Path, Path], None]] = {"sarcoma": sarcoma, "organs": organs}
    for name in given.sets:
        makers[name](given.scans, given.folder / f"Dataset_{name}")
        table(name, given.arms, given)


if __name__ == "__main__":
    main()
