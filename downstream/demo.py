"""`axial demo`: the whole way on made-up patients, by the same commands that a user types.

Phantom CTs in three public layouts -> corpus -> three pretraining runs -> export -> fine-tuning -> prediction of
patients that no step has seen -> Dice, and one picture. Each command is printed before it runs; type it again by hand.
"""

from __future__ import annotations

import itertools
import json
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional

from data_curation import phantom
from data_curation.volumes import find, read
from downstream import geometry
from downstream.picture import Row, draw, pca_colours
from launch import cli
from launch.progress import Progress
from launch.run import Outcome, command
from launch.settings import Settings as Base
from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer
from pretrain.released import load_backbone

__all__ = ["DemoError", "Settings", "main"]

SHAPE = (24, 128, 128)  # slices, rows, columns of a phantom
# Labelled: all of the phantom's but pancreas and gallbladder, too small at 2.8 mm pixels for a minute of training.
ORGANS = ("liver", "spleen", "kidney_right", "kidney_left", "stomach", "aorta", "inferior_vena_cava", "spine", "lungs")
LAYOUTS = ("folder", "chaos", "totalsegmentator")  # of the unlabelled ones
CONFIGS = ("demo_stage1", "demo_stage2_gram", "demo_stage3_hires")
BODY_HU = -500
ENLARGED = 3  # of a slice before its features are drawn


class DemoError(ValueError):
    """One of the demo's commands did not end well; its own message stands above."""


class Settings(Base):
    """Settings of `axial demo`."""

    folder: Path | None = Field(None, description="where everything goes; null: a new temporary folder")
    unlabelled: int = Field(18, ge=6, description="phantom CTs to pretrain on")
    labelled: int = Field(44, ge=4, description="labelled phantom CTs to fine-tune on")
    held_out: int = Field(5, ge=1, description="phantom CTs that are predicted and scored, seen by no other step")
    seed: int = Field(0, ge=0, description="first phantom's seed")


def main(settings: Settings) -> Outcome:
    """Runs the demo; the same command with the same folder goes on where it was stopped."""
    start = time.monotonic()
    root = settings.folder or Path(tempfile.mkdtemp(prefix="axial-demo-"))
    corpus, labelled, runs = root / "corpus", root / "Dataset001_Phantom", root / "runs"
    _phantoms(settings, root, labelled)
    _axial("curate", str(_corpus_yaml(root)), f"folder={corpus}")
    _axial("report", f"folder={corpus}")
    backbone = _pretrained(corpus, runs)
    _axial("finetune", "demo.yaml", f"folder={runs / 'finetune'}", f"dataset={labelled}", f"backbone={backbone}")
    model = runs / "finetune" / "model.safetensors"
    predictions, scores = root / "predictions", root / "scores"
    _axial("predict", f"model={model}", f"images={labelled / 'imagesTs'}", f"folder={predictions}")
    scans, truth = labelled / "imagesTs", labelled / "labelsTs"
    _axial(
        "evaluate", f"predictions={predictions}", f"labels={truth}", f"images={scans}", f"folder={scores}", "workers=1"
    )
    picture = _picture(root, labelled, predictions, backbone)
    dice = _dice(scores)
    print(f"\nDice on {settings.held_out} patients that no step has seen, after {time.monotonic() - start:.0f} s:")
    for organ, value in dice.items():
        print(f"  {organ:<20}{value:.3f}  {'#' * round(40 * value)}")
    print(f"  {'mean':<20}{np.mean(list(dice.values())):.3f}")
    made = (str(picture), str(corpus / "report.html"), str(model), str(scores / "scores.html"))
    return Outcome(
        made=made, next=(command("status", f"folder={root}"), "axial curate --help, with your own CT folders")
    )


def _phantoms(settings: Settings, root: Path, labelled: Path) -> None:
    """Patients on disk as they arrive: NIfTI with turned axes, DICOM, TotalSegmentator's; labelled: nnU-Net's."""
    done = root / "phantoms.json"
    drawn = settings.model_dump(mode="json", exclude={"folder"})
    if done.is_file():
        if json.loads(done.read_text()) != drawn:
            raise DemoError(f"{root} holds the phantoms of another demo; give another folder")
        return
    print(f"phantom CTs -> {root}")
    each, more = divmod(settings.unlabelled, len(LAYOUTS))
    seeds = iter(range(settings.seed, settings.seed + 10_000))
    total = settings.unlabelled + settings.labelled + settings.held_out
    with Progress(total, "phantoms", "CTs") as bar:

        def take(count: int) -> Iterator[int]:
            for seed in itertools.islice(seeds, count):
                yield seed
                bar.advance()

        for number, layout in enumerate(LAYOUTS):
            phantom.write(layout, root / "ct" / layout, list(take(each + (number < more))), SHAPE)
        chosen = list(take(settings.labelled + settings.held_out))
        phantom.write("nnunet", labelled, chosen, SHAPE, organs=ORGANS, tests=settings.held_out)
    done.write_text(json.dumps(drawn))


def _corpus_yaml(root: Path) -> Path:
    """The configuration of a corpus, as a user writes it."""
    lines = [
        "datasets:",
        *(
            f"  - {{name: {layout}, root: {json.dumps(str(root / 'ct' / layout), ensure_ascii=False)}}}"
            for layout in LAYOUTS
        ),
    ]
    path = root / "corpus.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _pretrained(corpus: Path, runs: Path) -> Path:
    """The three pretraining runs, each from the one before, and the export of the last."""
    first, gram, last = (runs / config for config in CONFIGS)
    anchor = f"method.gram_teacher.path={first}"
    _axial("pretrain", f"{first.name}.yaml", f"folder={first}", f"data.corpus={corpus}")
    _axial("pretrain", f"{gram.name}.yaml", f"folder={gram}", f"data.corpus={corpus}", f"init_from={first}", anchor)
    _axial("pretrain", f"{last.name}.yaml", f"folder={last}", f"data.corpus={corpus}", f"init_from={gram}", anchor)
    _axial("export", f"folder={last}")
    return last / "export.safetensors"


def _axial(*words: str) -> None:
    """Shows and runs one command; DemoError if it fails."""
    print(f"\n$ axial {shlex.join(words)}", flush=True)
    code = cli.main(words)
    if code:
        raise DemoError(f"`axial {shlex.join(words)}` ended with exit code {code}; the reason stands above")


def _dice(scores: Path) -> dict[str, float]:
    """Mean Dice over the cases by organ."""
    organs = json.loads((scores / "summary.json").read_text())["organs"]
    return {organ: row["dice"]["mean"] for organ, row in organs.items() if organ != "mean"}


def _picture(root: Path, labelled: Path, predictions: Path, backbone: Path) -> Path:
    """Three slices of the first held-out patients: CT, what the pretrained backbone sees, prediction, truth."""
    model, window = load_backbone(backbone)
    names = {int(v): k for k, v in json.loads((labelled / "dataset.json").read_text())["labels"].items()}
    chosen = []
    for position, found in enumerate(itertools.islice(find(labelled / "imagesTs"), 3)):
        case = found.path.name.removesuffix("_0000.nii.gz")
        volume = read(found)
        z = round(len(volume.hu) * (0.3, 0.5, 0.7)[position])
        chosen.append(
            (case, volume, z, *(_labels(f / f"{case}.nii.gz")[z] for f in (predictions, labelled / "labelsTs")))
        )
    maps = [_features(model, window, volume.hu[z]) for _, volume, z, _, _ in chosen]
    bodies = [_pooled(volume.hu[z], m.shape) > BODY_HU for (_, volume, z, _, _), m in zip(chosen, maps, strict=True)]
    rows = [
        Row(f"{case}, slice {z}", volume.hu[z], volume.spacing[1:], colours, predicted, truth)
        for (case, volume, z, predicted, truth), colours in zip(chosen, pca_colours(maps, bodies), strict=True)
    ]
    return draw(root / "demo.png", rows, names, "axial demo: patients that no step has seen")


def _labels(path: Path) -> NDArray[np.integer]:
    """Label values [Z, Y, X] in LPS order, as volumes are read."""
    read_map = geometry.read_labelmap(path)
    return geometry.to_lps(read_map.array, read_map.place)


@torch.inference_mode()
def _features(model: VisionTransformer, window: HuWindow, hu: NDArray[np.int16]) -> NDArray[np.float64]:
    """Patch features [h, w, D] of a slice enlarged, so that patches are small against organs."""
    image = window.image(torch.from_numpy(hu.astype(np.float32)))[None]
    image = functional.interpolate(image, scale_factor=ENLARGED, mode="bicubic").expand(-1, model.in_channels, -1, -1)
    side = [size - size % model.patch_size for size in image.shape[-2:]]
    (features,) = model.eval().intermediate(image[..., : side[0], : side[1]], [-1])
    return features[0].permute(1, 2, 0).double().numpy()


def _pooled(hu: NDArray[np.int16], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean HU of each patch of the grid."""
    image = torch.from_numpy(hu.astype(np.float64))[None, None]
    return functional.adaptive_avg_pool2d(image, (shape[0], shape[1]))[0, 0].numpy()
