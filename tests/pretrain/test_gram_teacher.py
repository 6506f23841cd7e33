"""Where the Gram teacher comes from and when it is renewed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from pretrain.data.batch import Batch
from pretrain.loop import Guard
from pretrain.losses.gram import gram_loss
from pretrain.methods.self_distillation import GramTeacher, SelfDistillation, Settings, build
from pretrain.models.vit import VitSettings
from pretrain.parallel import fill, place

VIT = VitSettings(size="custom", width=16, depth=1, heads=1, in_channels=1, layerscale=0.5)


def make(**gram: Any) -> SelfDistillation:
    with torch.device("meta"):
        settings = Settings(
            terms={"dino": None, "ibot": None, "koleo": None, "gram": {}}, momentum=0.5, gram_teacher=gram
        )
        method = build(settings, model=VIT, steps=8, guard=Guard(torch.device("cpu")))
    for network in method.networks.values():
        place(network, torch.device("cpu"))
    method.placed()
    for name, parts in method.initial(0, None, lambda text: None).items():
        fill(method.networks[name]["backbone"], parts["backbone"])
    return method


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@given(
    every=st.integers(1, 7),
    first=st.integers(0, 20),
    most=st.none() | st.integers(1, 3),
)
def test_renewals_fall_where_the_official_loop_has_them(every: int, first: int, most: int | None) -> None:
    gram = GramTeacher(path=Path("run"), update_every=every, first_update=first, max_updates=most)
    done, expected = 0, []
    for step in range(30):
        if step + 1 >= first and (step + 1) % every == 0 and done < (math.inf if most is None else most):
            expected.append(step)
            done += 1
    assert [step for step in range(30) if gram.renewed_after(step)] == expected


def test_a_copy_is_taken_before_the_step_that_is_named() -> None:
    method = make(copy_at=3)
    frozen = method.networks["gram_teacher"]["backbone"]
    assert same(frozen, method.teacher["backbone"])
    seen = []
    for step in range(5):
        with torch.no_grad():
            for p in method.student.parameters():
                p.add_(0.1)
        method.after_step(step)
        seen.append(same(frozen, method.teacher["backbone"]))
    assert seen == [False, False, True, False, False]


def test_the_average_itself_can_be_the_gram_teacher() -> None:
    method = make(live=True)
    assert set(method.networks) == {"student", "teacher"}
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([[True, False, True, False], [False] * 4])
    one = Batch(images, images[:0], images.repeat(1, 1, 2, 2), masks, masks.flatten().nonzero()[:, 0],
                torch.full((2,), 0.5), ("a",))  # fmt: skip
    with torch.no_grad():
        seen = method.teacher["backbone"](images).patches
        student = method.student["backbone"](images, masks).patches
    torch.testing.assert_close(method.loss(one, 0)["gram"].detach(), gram_loss(student, seen))


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        ({}, "set path to an earlier run or file, copy_at"),
        ({"live": True, "update_every": 2}, "update_every cannot be given with it"),
        ({"live": True, "path": "run"}, "path cannot be given with it"),
    ],
)
def test_a_gram_teacher_has_one_source(gram: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GramTeacher(**gram)
