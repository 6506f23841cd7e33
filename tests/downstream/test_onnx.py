"""The ONNX file gives the model's logits of HU, says what it is for, and holds no path of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.channels import image
from downstream.context import Context
from downstream.decoders import linear
from downstream.model import Header, ModelError, load_model
from downstream.onnx import Settings, main
from launch.cli import main as axial
from launch.settings import SettingsError, load, plugins
from tests.downstream.small_models import CT, MR, TUNINGS, VIT, WIDE, saved

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def same(model_file: Path, onnx_file: Path, size: tuple[int, int], batches: tuple[int, ...] = (1, 3)) -> None:
    """Logits of made-up scans, for several sizes of a batch."""
    model, header = load_model(model_file)
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(1)
    context = (header.context.size,) if header.context.slices else ()
    for batch in batches:
        stored = draw.integers(-2000, 3000, (batch, *context, len(header.channels), *size)).astype(np.float32)
        with torch.no_grad():
            want = model(image(torch.from_numpy(stored), header.channels)).numpy()
        (found,) = session.run(None, {"image": stored})
        assert found.shape == want.shape
        assert np.abs(found - want).max() <= 1e-4 * max(1, np.abs(want).max())


def test_onnxruntime_gives_the_models_logits_of_hu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Of a run folder, with neighbours, CT in two windows beside MR, an adapter, a size that is no multiple of 8."""
    path = saved(
        tmp_path / "model.safetensors",
        Context(slices=1, mm=5.0),
        channels=(WIDE, MR, CT),
        adapters=TUNINGS["adapter"],
        vit=VIT.model_copy(update={"depth": 1}),
        decoder=linear.Settings(taps=1),
    )
    assert axial(["onnx", f"model={tmp_path}", "size=[30, 45]"]) == 0
    said = capsys.readouterr()
    assert "input `image` [batch, 3, 3, 30, 45]: HU, or thousandths of a deviation;" in said.out
    assert "logits equal to" in said.out
    assert not said.err
    assert not recwarn
    written = tmp_path / "model.onnx"
    same(path, written, (30, 45))
    data = written.read_bytes()
    assert str(tmp_path).encode() not in data
    assert str(Path(__file__).parents[2]).encode() not in data
    assert b"site-packages" not in data
    facts = onnxruntime.InferenceSession(data).get_modelmeta().custom_metadata_map
    assert Header.model_validate_json(facts["header"]) == load_model(path)[1]
    assert json.loads(facts["header"])["spacing"] == 0.8
    assert "HU of a ct channel" in facts["input"]


@pytest.mark.slow
@pytest.mark.parametrize("slices", [0, 1])
@pytest.mark.parametrize("kind", plugins("downstream.decoders"))
@pytest.mark.parametrize(
    "change", [{}, {"in_channels": 1}, {"ffn": "swiglu"}, {"registers": 0, "qkv_bias": False}], ids=str
)
def test_every_decoder_and_backbone_can_be_exported(
    tmp_path: Path, kind: str, slices: int, change: dict[str, object]
) -> None:
    decoder, vit = plugins("downstream.decoders")[kind].Settings(), VIT.model_copy(update=change)
    path = saved(tmp_path / "model.safetensors", Context(slices=slices), decoder=decoder, vit=vit)
    main(Settings(model=path))
    same(path, tmp_path / "model.onnx", (32, 32))


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.safetensors", decoder=linear.Settings())
    with pytest.raises(SettingsError, match=r"output: must end in \.onnx"):
        load(Settings, overrides=[f"model={path}", "output=x.pt"])
    with pytest.raises(SettingsError, match="size: needs two sides of at least 1 px"):
        load(Settings, overrides=[f"model={path}", "size=[0, 3]"])
    with pytest.raises(ModelError, match="no such file"):
        main(Settings(model=tmp_path / "none.safetensors"))
    for fold in range(2):
        (tmp_path / f"run/fold_{fold}").mkdir(parents=True)
        saved(tmp_path / f"run/fold_{fold}/model.safetensors", decoder=linear.Settings())
    with pytest.raises(ModelError, match="holds 2 models, and an ONNX file is one"):
        main(Settings(model=tmp_path / "run"))
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ModelError, match="is a folder"):
        main(Settings(model=path, output=tmp_path / "folder.onnx"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ModelError, match=r"needs onnxscript: pip install 'axial-ct\[onnx\]'"):
        main(Settings(model=path))


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.safetensors", decoder=linear.Settings())
    monkeypatch.setattr("downstream.onnx.serialised", lambda *_: b"")
    monkeypatch.setattr("downstream.onnx._compared", lambda *_: 0.5)
    with pytest.raises(ModelError, match=r"differ by 5\.0e-01, where .* uncertain by \de-0[6-9]; nothing is written"):
        main(Settings(model=path))
    assert not (tmp_path / "model.onnx").exists()
    monkeypatch.setattr("downstream.onnx._rounding", lambda *_: 0.2)  # a network that nothing can compute better
    main(Settings(model=path))
    assert (tmp_path / "model.onnx").exists()
