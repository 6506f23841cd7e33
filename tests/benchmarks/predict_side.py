"""One side of the comparison of predictors: `python -m tests.benchmarks.predict_side ours|nnunet PEER OUT ...`.

Started by `bench_predict --peer`, which reads its answers. Both sides build the same network from one seed and label
the same phantom: HU in, a label map on the volume's own grid out. nnU-Net's side is its own resampling, its own
`nnUNetPredictor` and its own export, imported from a folder; both ways of resampling differ, so the network is given
slightly different slices. With `resampled=true` it is given ours, outside of its clock: both label the same.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_curation import phantom
from downstream.allocator import pages_kept
from downstream.channels import image
from downstream.inference import predict_volume
from downstream.model import Header
from downstream.prepared import resample, target_size
from launch.settings import load
from tests.benchmarks.bench_predict import Bench, build_model
from tests.benchmarks.turns import peak_rss, reset_peak, serve


def main(words: list[str]) -> None:
    """Builds the side and serves."""
    side, peer, out, *rest = words
    bench = load(Bench, None, rest)
    torch.set_num_threads(bench.threads)
    model, header = build_model(bench)
    made = phantom.make(0, (bench.slices, bench.pixels, bench.pixels), fov_mm=380.0)
    if side == "ours":
        stored = made.hu[None]

        def work() -> NDArray[np.uint8]:
            with pages_kept() if bench.device == "cpu" else contextlib.nullcontext():  # as the verb does
                return predict_volume([model], header, stored, made.spacing, bench.window)

    else:
        with contextlib.redirect_stdout(sys.stderr):  # it talks, and nothing may stand before the answers
            work = _nnunet(Path(peer), bench, model, header, made.hu, made.spacing)
    serve({}, lambda: _answer(work, Path(out), torch.device(bench.device)))


def _answer(work: Callable[[], NDArray[np.uint8]], out: Path, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    base = reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    wall = time.perf_counter() - start
    answer = {"wall": wall, "cpu": time.process_time() - cpu, "memory": peak_rss() - base}
    if device.type == "cuda":
        answer["gpu"] = torch.cuda.max_memory_allocated()
    np.save(out, found)
    return answer


def _nnunet(
    folder: Path,
    bench: Bench,
    model: torch.nn.Module,
    header: Header,
    hu: NDArray[np.int16],
    spacing: tuple[float, float, float],
) -> Callable[[], NDArray[np.uint8]]:
    sys.path.append(str(folder))  # last, so that nothing of ours is taken from there
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    in_plane = [bench.spacing or spacing[1], bench.spacing or spacing[2]]
    configuration = {
        "architecture": {},  # of its own network, which is not asked for
        "patch_size": [bench.patch, bench.patch],
        "spacing": in_plane,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
    }
    axes = [0, 1, 2]
    plans = {"configurations": {"2d": configuration}, "transpose_forward": axes, "transpose_backward": axes}
    manager = PlansManager(plans)
    names = {"background": 0} | {f"organ {i}": i for i in range(1, bench.classes)}
    dataset = {"labels": names, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    predictor = nnUNetPredictor(
        tile_step_size=1 - bench.window.overlap,
        use_gaussian=True,
        use_mirroring=bench.window.mirror,
        device=torch.device(bench.device),
        allow_tqdm=False,
    )
    chosen = manager.get_configuration("2d")
    predictor.manual_initialization(model, manager, chosen, None, dataset, "none", (0, 1))
    about = {
        "spacing": list(spacing),
        "shape_after_cropping_and_before_resampling": list(hu.shape),
        "shape_before_cropping": list(hu.shape),
        "bbox_used_for_cropping": [[0, side] for side in hu.shape],
    }
    ours = _by_ours(header, hu, spacing)

    def work() -> NDArray[np.uint8]:
        slices = ours if bench.resampled else _by_theirs(header, hu, spacing)
        logits = predictor.predict_sliding_window_return_logits(slices).cpu()
        found: NDArray[np.uint8] = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, manager, chosen, predictor.label_manager, about, num_threads_torch=bench.threads
        )
        return found

    return work


def _by_ours(header: Header, hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> torch.Tensor:
    """The network's input [1, Z, Y, X] as `axial predict` makes it."""
    size = target_size(hu.shape[1:], spacing[1:], header.spacing)
    return image(torch.from_numpy(resample(hu, size))[:, None], header.channels).movedim(1, 0).contiguous()


def _by_theirs(header: Header, hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> torch.Tensor:
    """The same by nnU-Net's resampling, after normalisation as it has it: cubic in the plane, nearest along z."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    values = header.channels[0].window.apply(torch.from_numpy(hu)).numpy()[None]
    size = target_size(hu.shape[1:], spacing[1:], header.spacing)
    if size == hu.shape[1:]:
        return torch.from_numpy(values)
    wanted, new = (hu.shape[0], *size), [spacing[0], header.spacing, header.spacing]
    given = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return torch.as_tensor(resample_data_or_seg_to_shape(values, wanted, list(spacing), new, **given))


if __name__ == "__main__":
    main(sys.argv[1:])
