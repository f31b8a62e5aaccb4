"""Models as files of other runtimes: they compute what the model does, also in another process."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import poa
from helpers.commands import fails
from helpers.tiny import ONE_STEP, OVERRIDES, tiny_config
from poa.__main__ import main
from poa.backbones import Backbone
from poa.data.crops import CropsConfig
from poa.distributed import World
from poa.errors import ExportError, InputError
from poa.evaluate.features import extract_features
from poa.evaluate.knn import class_token
from poa.export import export_file, extract, formats
from poa.export.formats import TOLERANCE, largest_difference, onnx_runner
from poa.files import read_json, write_json
from poa.options import to_dict
from poa.presets import preset

ALONE = World(0, 1, torch.device("cpu"))
ELSEWHERE = """
import sys
import numpy, onnxruntime
import poa
path, out, *files = sys.argv[1:]
session = onnxruntime.InferenceSession(path)
pixels = poa.Preprocessing.from_dict(session.get_modelmeta().custom_metadata_map["preprocessing"])(files)
(features,) = session.run(["features"], {"images": pixels.numpy()})
numpy.savez(out, pixels=pixels, features=features)
"""


INT8 = ["--format", "onnx", "--dtype", "int8"]


def need_onnx() -> None:
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def trained(backbone: Backbone) -> Backbone:
    """With weights that are not near to their initial ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return backbone.eval()


@pytest.mark.parametrize("name", ["quickstart", "quickstart-swin"])
def test_programs_take_any_number_of_images(name: str, tmp_path: Path) -> None:
    backbone = trained(preset(name).method.backbone.build())
    model = poa.load(extract(backbone, backbone.space.smallest, tmp_path, CropsConfig()))
    path = export_file(model, tmp_path, "pt2")
    program = torch.export.load(path, extra_files=(extra := {formats.METADATA: ""}))
    assert poa.Preprocessing.from_dict(extra[formats.METADATA]) == model.preprocess
    norms = [node for node in program.graph.nodes if "layer_norm" in str(node.target)]
    assert len(norms) == sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    images = torch.randn(64, 3, model.preprocess.size, model.preprocess.size)
    for part in (images[:1], images[:3], images):
        with torch.no_grad():
            assert float((program.module()(part)[0] - model(part)).abs().max()) < 1e-5


def test_files_of_other_weights_do_not_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = tiny_config().method.backbone.build()
    folder = extract(backbone, backbone.space.smallest, tmp_path, CropsConfig())
    for name in ("model.onnx", "model.int8.onnx", "model.fp16.pt2", "mine.onnx"):
        (folder / name).write_bytes(b"")
    poa.load(folder).save(folder)
    assert len(list(folder.iterdir())) == 6 and not caplog.records
    extract(trained(backbone), backbone.space.smallest, tmp_path, CropsConfig())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "mine.onnx", "model.safetensors"]
    assert [record.getMessage() for record in caplog.records][2:] == [
        f"{folder / 'model.fp16.pt2'}: removed, it was made of other weights"
    ]


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_wrong_export_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "onnx":
        need_onnx()
    backbone = trained(tiny_config().method.backbone.build())
    model = poa.load(extract(backbone, backbone.space.smallest, tmp_path, CropsConfig()))
    right = formats._Served.forward
    monkeypatch.setattr(formats._Served, "forward", lambda self, images: (right(self, images)[0] * 1.001,))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="within 0.0001 of .* largest difference of 1.00e-03"):
        export_file(model, tmp_path, kind)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    backbone = tiny_config().method.backbone.build()
    model = poa.load(extract(backbone, backbone.space.smallest, tmp_path, CropsConfig()))
    with pytest.raises(InputError, match=r"onnx: expected this package, .*poa-pretrain\[export\]"):
        export_file(model, tmp_path, "onnx")


def odd_images(folder: Path) -> list[str]:
    """Grey, with a palette, transparent, of 16 bits, CMYK, upright by EXIF alone, narrow, tiny."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 4), dtype=np.uint8)
    whole = Image.fromarray(noise[..., :3])
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    for name, image in (
        ("grey.png", whole.convert("L")),
        ("palette.gif", whole.convert("P")),
        ("transparent.png", Image.fromarray(noise)),
        ("deep.png", deep),
        ("print.jpg", whole.convert("CMYK")),
        ("narrow.png", whole.resize((300, 5))),
        ("tiny.png", whole.resize((1, 1))),
    ):
        image.save(folder / name)
    whole.save(folder / "turned.jpg", exif=turned)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("dtype", [None, *TOLERANCE], ids=str)
def test_an_image_has_the_same_feature_everywhere(dtype: str | None, tmp_path: Path) -> None:
    """In evaluation, of the folder, embedded, and of an ONNX file in another process; of images nobody
    expects."""
    if dtype:
        need_onnx()
    (tmp_path / "images").mkdir()
    files = odd_images(tmp_path / "images")
    config = tiny_config(f"data.source={tmp_path / 'images'}", "method.canvas=48", "data.bits=16")
    crops, backbone = config.method.crops, trained(config.method.backbone.build())
    subnet, source = backbone.space.smallest, config.data.open(0).train
    pixels: list[torch.Tensor] = []
    functions = [class_token(backbone, subnet), lambda images: pixels.append(images) or images.flatten(1)]
    evaluated = extract_features(functions, source, crops, ALONE, canvas=48)
    assert evaluated and [source.storage.name(i) for i in range(len(source))] == files

    model = poa.load(extract(backbone, subnet, tmp_path, crops, canvas=48, bits=16))
    assert torch.equal(model.preprocess(files), torch.cat(pixels))
    embedded = poa.embed(model, tmp_path / "images", workers=0, device="cpu")
    with torch.no_grad():
        features = model(files)
    assert embedded.names == files
    for others in (evaluated.features[0], torch.from_numpy(embedded["cls"])):
        assert float((features - others).abs().max()) < 1e-5
    if dtype is None:
        return
    path = export_file(model, tmp_path, "onnx", dtype)
    command = [sys.executable, "-c", ELSEWHERE, str(path), str(tmp_path / "seen.npz"), *files]
    places = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=120, env=places)
    seen = np.load(tmp_path / "seen.npz")
    assert np.array_equal(seen["pixels"], torch.cat(pixels).numpy())
    elsewhere = torch.from_numpy(seen["features"])
    limit = TOLERANCE[dtype] * max(1.0, float(features.abs().max()))
    assert 0 < float((features - elsewhere).abs().max()) < limit
    graph = importlib.import_module("onnx").load(path).graph
    norms = sum(node.op_type == "LayerNormalization" for node in graph.node)
    assert norms == sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("trained") / "run")
    assert main(["pretrain", "--out", path, *OVERRIDES, *ONE_STEP, "data.holdout=0.9"]) == 0
    assert main(["evaluate", path, "--subnets", "32x2", "--device", "cpu"]) == 0
    return path


def test_int8_is_scored_beside_fp32(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_onnx()
    command = ["extract", run, "--out", str(tmp_path), "--subnets", "32x2", "--format", "onnx"]
    runtime, onnx = (importlib.import_module(name) for name in ("onnxruntime", "onnx"))
    assert main([*command, "--dtype", "int8"]) == 0
    folder, said = capsys.readouterr().out.splitlines()
    path = Path(folder) / "model.int8.onnx"
    known = runtime.InferenceSession(path).get_modelmeta().custom_metadata_map
    scores = json.loads(known["knn"])
    accuracies = f"{scores['int8']:.1%} in int8, {scores['fp32']:.1%} in fp32"
    assert said == f"{path}: 20-NN accuracy {accuracies}" and scores["fp32"] > 0.3
    assert abs(scores["fp32"] - scores["int8"]) < 0.05
    assert poa.Preprocessing.from_dict(known["preprocessing"]) == poa.load(folder).preprocess
    graph = onnx.load(path).graph
    weights = [w for w in graph.initializer if w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1]
    assert len(weights) == 1 + 2 * 4, "of the patch embedding and of two blocks"
    assert 0 < largest_difference(poa.load(folder), onnx_runner(path)) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp16"], "--dtype fp16: expected --format onnx or pt2 with it, got timm"),
        (["--format", "pt2", "--dtype", "int8"], "--dtype int8: expected --format onnx with it, got pt2"),
        (["--dry-run"], "--dry-run: expected --push USER/NAME with it"),
        (["32x2", "--push", "a/b"], "--push: expected one subnet, got 2"),
        ([*INT8, "--image-size", "32"], "--dtype int8: expected the image size of training 24, got 32"),
        (INT8, "expected held-out images with labels, got none (data.holdout=0)"),
    ],
)
def test_options_that_do_not_fit_each_other(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("poa.cli.commands.require_packages", lambda kind: None)
    write_json(tmp_path / "config.json", to_dict(tiny_config("data.holdout=0")))
    assert message in fails(capsys, "extract", str(tmp_path), "--subnets", "16x1", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_model_goes_to_the_hub_with_its_card(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            calls.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, folder_path: Path, repo_id: str, allow_patterns: list[str]) -> None:
            calls.append((folder_path.name, repo_id, allow_patterns))
            if repo_id == "me/taken":
                raise OSError("403 Forbidden")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Hub))
    command = ["extract", run, "--subnets", "32x2", "--license", "cc-by-4.0", "--push"]
    other = read_json(Path(run) / "evaluation.json", "")
    other["settings"]["step"] = 12
    Path(run, "evaluation-2.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert main([*command, "me/model", "--dry-run"]) == 0
    folder, said = capsys.readouterr().out.splitlines()
    names = r"README\.md, config\.json, (model\.int8\.onnx, )?model\.safetensors"  # another test quantises it
    assert re.match(rf"would push to me/model: {names} \(0\.\d MiB", said)
    assert not calls
    assert main([*command, "me/model"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("pushed to https://hub/me/model: README.md, ")
    files = ["README.md", "config.json", "model.safetensors"]
    assert calls == [("me/model", True, True), ("vit-32x2", "me/model", files)]
    assert main([*command, "me/taken"]) == 2
    assert "--push me/taken: expected a writable repository, got 403 Forbidden\n" in capsys.readouterr().err
    card = (Path(folder) / "README.md").read_text()
    Path(run, "evaluation-2.json").unlink()
    assert "of step 12" not in card
    assert card.startswith('---\nlibrary_name: timm\nlicense: "cc-by-4.0"\n')
    (knn,) = [row["knn"] for row in read_json(Path(run) / "evaluation.json", "")["subnets"]]
    for k, accuracy in knn.items():
        assert f"| teacher of step 1, digits: k={k} | {accuracy:.1%} |" in card
    assert f"{poa.load(folder).info['params']:,} parameters" in card and "| trained on | digits |" in card
