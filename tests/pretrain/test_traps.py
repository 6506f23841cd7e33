"""The traps of the reference implementation, one test each in the order of their list, so that none comes back.

Where a whole test stands elsewhere, `ELSEWHERE` names it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from launch.log import step_line
from launch.settings import load
from pretrain.data.crops import CropSettings, CropShape
from pretrain.data.masks import MaskSettings, target_counts
from pretrain.data.order import sample_order
from pretrain.loop import Guard, step_seed
from pretrain.losses import koleo
from pretrain.losses._sinkhorn import sinkhorn
from pretrain.methods.self_distillation import SelfDistillation
from pretrain.methods.self_distillation import Settings as MethodSettings
from pretrain.methods.self_distillation import build as build_method
from pretrain.models.heads import DinoHead
from pretrain.models.rope import Rope, RopeSettings
from pretrain.models.vit import VitSettings, build
from pretrain.optim import OptimSettings, multipliers
from pretrain.parallel import fill, initialised, place
from pretrain.released import ReleasedError, read
from pretrain.schedule import scale_lr
from pretrain.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "pretrain/configs"
VIT = VitSettings(size="custom", width=16, depth=1, heads=1, in_channels=1)
HEAD = {"prototypes": 8, "hidden": 8, "bottleneck": 8}
ELSEWHERE = {
    1: ("test_trajectory", "test_nine_steps_are_the_official_ones"),  # the Gram step runs
    6: ("test_crops", "test_distortions_happen_with_their_probability"),  # the blur's among them
    8: ("test_loop", "test_a_step_that_is_not_finite_changes_nothing_and_is_counted"),
    9: ("test_export", "test_biases_hidden_by_a_mask_of_zeros_stay_without_effect_but_can_train"),
    11: ("test_self_distillation", "test_one_rank_is_two_ranks"),  # buffers of a sharded model
    16: ("test_terms", "test_new_heads_start_at_the_logarithm_of_the_prototypes"),
    20: ("test_stream", "test_a_step_has_one_shape_on_all_ranks"),  # one loader for all sizes
}


def made(**settings: Any) -> SelfDistillation:
    """A small method with its weights."""
    terms = {"dino": {"head": HEAD}, "ibot": None, "koleo": None, **settings.pop("terms", {})}
    with torch.device("meta"):
        method = build_method(
            MethodSettings(terms=terms, **settings), model=VIT, steps=9, guard=Guard(torch.device("cpu"))
        )
    for network in method.networks.values():
        for part in network.values():
            place(part, torch.device("cpu"))
    method.placed()
    for name, parts in method.initial(0, None, lambda text: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    return method


@pytest.mark.parametrize(("file", "test"), ELSEWHERE.values(), ids=[str(number) for number in ELSEWHERE])
def test_the_others_are_held_elsewhere(file: str, test: str) -> None:
    assert f"def {test}(" in (Path(__file__).parent / f"{file}.py").read_text()


@pytest.mark.parametrize("name", ["stage2_gram", "stage3_hires"])
def test_2_a_later_phase_counts_its_own_steps_and_needs_weights_to_start_from(name: str) -> None:
    settings = load(Settings, CONFIGS / f"{name}.yaml", ["folder=run", "data.corpus=corpus"])
    assert settings.init_from is not None
    method: Any = settings.method
    assert method.terms["gram"].weight.over(settings.steps)(settings.steps // 100) > 0
    with pytest.raises(ValidationError, match="set gram_teacher"):
        MethodSettings(terms={"gram": {}})


def test_3_a_gram_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReleasedError, match="ignore does not exist; give a run folder"):
        made(terms={"gram": {}}, gram_teacher={"path": tmp_path / "ignore"})


def test_4_a_renewal_replaces_what_was_not_a_number() -> None:
    method = made(terms={"gram": {}}, gram_teacher={"copy_at": 2})
    frozen = method.networks["gram_teacher"]
    for parameter in frozen.parameters():
        parameter.fill_(math.nan)
    method.after_step(0)
    assert not any(parameter.isfinite().any() for parameter in frozen.parameters())
    method.after_step(1)
    assert all(parameter.isfinite().all() for parameter in frozen.parameters())


def test_5_positions_have_the_precision_of_the_settings_in_training_too() -> None:
    assert RopeSettings().dtype == "fp32"
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rope = Rope(16, RopeSettings(dtype=dtype, rescale=2.0)).train()  # type: ignore[arg-type]
        rope.init_weights()
        assert {part.dtype for part in rope(3, 3)} == {expected}


def test_7_sinkhorn_takes_logits_of_any_size() -> None:
    logits = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    exact = (logits / 0.04).clone()
    for _ in range(3):
        exact = exact - exact.logsumexp(0, keepdim=True)
        exact = exact - exact.logsumexp(1, keepdim=True)
    assert torch.isnan(torch.exp(logits.float() / 0.04) / torch.exp(logits.float() / 0.04).sum()).any()
    torch.testing.assert_close(sinkhorn(logits.float(), 0.04).double(), exact.exp(), rtol=1e-3, atol=1e-5)
    low = torch.full((3, 4), -50.0)
    torch.testing.assert_close(sinkhorn(low, 0.04), torch.full((3, 4), 0.25))


def test_10_weights_are_loaded_strictly(tmp_path: Path) -> None:
    state = initialised(build_on_meta(), 0)
    state.pop("blocks.0.attn.qkv.weight")
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ReleasedError, match=r"part\.pth holds no"):
        read(tmp_path / "part.pth")
    with pytest.raises(AssertionError, match="keys differ"):
        fill(build(VIT), state)


def build_on_meta() -> nn.Module:
    with torch.device("meta"):
        return build(VIT)


def test_12_the_learning_rate_is_said_as_it_is_applied() -> None:
    assert scale_lr(1e-3, 64, "sqrt_wrt_1024") == pytest.approx(1e-3)
    assert scale_lr(1e-3, 64, "none") == 1e-3
    assert "lr 2.0e-6" in step_line(1, 2, {"lr": 2e-6}, {}, {})


def test_13_the_masked_share_need_not_depend_on_the_batch() -> None:
    def share(edge: Any, images: int) -> float:
        counts = target_counts(MaskSettings(edge=edge), (16, 16), images)
        return float(np.mean([count for count in counts if count])) / 256

    assert share("upper", 1) - share("upper", 64) > 0.15
    assert share("middle", 1) == pytest.approx(share("middle", 64), abs=0.01)


def test_14_koleo_finds_a_group_for_any_batch_and_number_of_ranks() -> None:
    for group, images, world in ((16, 8, 1), (16, 5, 7), (3, 4, 2), (16, 8, 64)):
        ranks = koleo.ranks_of_group(group, images, world)
        assert world % ranks == 0
        assert images % koleo.set_size(group, images) == 0


def test_15_koleo_survives_twins_and_loners_and_is_exact_in_half_precision() -> None:
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    for images in (x, x.repeat(3, 1)):
        half = images.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = koleo.koleo_loss(half)
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert half.grad is not None
        assert half.grad.isfinite().all()


def test_17_tokens_can_go_without_weight_decay_and_names_decide_nothing_else() -> None:
    plain, spared = (multipliers(build(VIT), OptimSettings(exclude_tokens=option)) for option in (False, True))
    changed = {name for name in plain if plain[name] != spared[name]}
    assert changed == {"cls_token", "storage_tokens", "mask_token"}


def test_18_draws_and_order_follow_from_seed_and_count_alone() -> None:
    whole = sample_order(np.arange(40), 17, 5)
    np.testing.assert_array_equal(sample_order(np.arange(23, 40), 17, 5), whole[23:])
    assert sorted(whole[:17]) == list(range(17))
    assert len({step_seed(0, step, rank) for step in range(50) for rank in range(4)}) == 200
    assert step_seed(3, 7, 1) == step_seed(3, 7, 1)


def test_19_networks_change_mode_as_every_module_does() -> None:
    method = made()
    for network in method.networks.values():
        assert not any(module.training for module in network.eval().modules())
    assert method.student.train(mode=True).training
    assert not method.student.train(mode=False).training


def test_20_sizes_are_drawn_by_step_not_by_loader() -> None:
    shapes = tuple(CropShape(global_size=side, local_size=32, probability=0.5) for side in (64, 96))
    crops = CropSettings(mix=shapes)
    drawn = [crops.shape_at(1, step).global_size for step in range(30)]
    assert set(drawn) == {64, 96}
    assert drawn[11:] == [crops.shape_at(1, step).global_size for step in range(11, 30)]


def test_21_one_process_needs_neither_a_gpu_nor_a_process_group() -> None:
    assert not dist.is_initialized()
    made().after_step(0)
    assert not dist.is_initialized()


def test_22_half_precision_keeps_norms_softmax_and_positions_fine() -> None:
    torch.manual_seed(0)
    model, images = build(VIT).eval(), torch.randn(2, 1, 64, 64)
    seen: set[torch.dtype] = set()
    model.norm.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images).patches
    assert seen == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(half.float(), model(images).patches, rtol=0, atol=0.05)
    assert {part.dtype for part in model.rope_embed(4, 4)} == {torch.float32}


def test_23_a_teachers_logits_are_not_rounded_to_half_precision() -> None:
    torch.manual_seed(0)
    head = DinoHead(16, 16, 8, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.randn(4, 16))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
