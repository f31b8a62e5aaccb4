"""Runs that start from pretrained weights: which are read, that they compute the same, what is refused."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import golden_cases as golden
from helpers.pretrained import random_weights, same_features
from helpers.tiny import SHORT, tiny_config, tiny_pyramid
from poa.__main__ import main
from poa.backbones import Backbone
from poa.backbones.positions import positions_of_grid
from poa.checkpoint import RunFolder, read_checkpoint
from poa.errors import DivergenceError, InputError
from poa.export import extract
from poa.initialization import initial_config, read_source
from poa.initialization.order import random_order
from poa.official import load_backbone
from poa.options import override
from poa.presets import preset
from poa.report import curves_of
from poa.step import initial_network
from poa.train import pretrain

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
DINOV3 = {"patch_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "global_pool": "token"}
DINO = {"img_size": 42, "patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 2}
ROPE = {"img_size": 48, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "without-biases": ("vit_tiny_patch16_224", SMALL | {"qkv_bias": False}),
    "layer-scale": ("vit_small_patch14_dinov2", DINO),
    "registers": ("vit_small_patch14_reg4_dinov2", DINO),
    "gate": ("vit_giant_patch14_dinov2", DINO | {"embed_dim": 96, "reg_tokens": 4, "no_embed_class": True}),
    "rotary": ("vit_small_patch16_dinov3", DINOV3),
    "rotary-gate": ("vit_huge_plus_patch16_dinov3_qkvb", DINOV3),
    "eva02": ("eva02_tiny_patch14_224", DINO | {"ref_feat_shape": 5}),
    "rope": ("vit_small_patch16_rope_224", ROPE),
    "rope-and-positions": ("vit_small_patch16_rope_ape_224", ROPE),
    "patch-of-8-without-class-position": ("deit3_small_patch16_224", SMALL),
    "resnet": ("resnet50_gn", {"layers": [1, 2, 1, 1]}),
}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms-of-q": (
        "vit_tiny_patch16_224",
        SMALL | {"qk_norm": True},
        "0 expected weights missing .* 12 unknown",
    ),
    "activation": (
        "vit_tiny_patch16_224",
        SMALL | {"act_layer": "silu"},
        "features that differ by .*activation",
    ),
    "gate-of-another-activation": (
        "vit_giant_patch14_dinov2",
        DINO | {"embed_dim": 96, "act_layer": "gelu"},
        "features that differ by .*activation",
    ),
    "batch-norm": (
        "resnet18",
        {"layers": [1, 1, 1, 1]},
        "bn1.num_batches_tracked: expected one of torch.float32",
    ),
    "mixed-rotary": (
        "vit_small_patch16_rope_mixed_224",
        ROPE,
        "expected a rotary embedding of .* got .*Mixed",
    ),
    "norm-in-mlp": ("eva02_base_patch14_224", DINO, "unknown"),
}


SUBNETS = ["16x1", "16x2", "32x1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vit-32x2` and `resnet-32x1-2-2` of extracted models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for config in (tiny_config(), tiny_pyramid("resnet")):
        backbone = random_weights(config.method.backbone.build())
        extract(backbone, backbone.space.intact, folder, config.method.crops)
    return folder


def of_timm(folder: Path, architecture: str, arguments: dict[str, Any]) -> Any:
    """A model of timm with random weights, and its folder."""
    timm = pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    model = random_weights(timm.create_model(architecture, **arguments))
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_timm_compute_the_same(family: str, tmp_path: Path) -> None:
    model = of_timm(tmp_path, *FAMILIES[family])
    config = initial_config("elastic", str(tmp_path), ["head.prototypes=8", "hidden=8"])
    source = read_source(str(tmp_path))
    size = source.backbone.config.image_size
    at_source = replace(config.method.backbone, image_size=size).build()
    source.place_into(at_source)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, (got,) = model.forward_features(images), at_source([images])
        expected, seen = model.forward_head(features, pre_logits=True), got.cls
        if family == "eva02":
            assert str(source).endswith("so its class token may know little")
            seen = at_source.mean_pool(got)
            ends = at_source.space.smallest, at_source.space.intact
            _, folder = (extract(at_source, s, tmp_path / "models", config.method.crops) for s in ends)
            same_features(read_source(str(folder)).backbone, source.backbone)
            save_file(model.state_dict(), tmp_path / "eva.safetensors")
            with pytest.raises(InputError, match="expected weights whose names tell the position embedding"):
                read_source(str(tmp_path / "eva.safetensors"), config.method.backbone)
    assert float((seen - expected).abs().max()) < 1e-5
    order = random_order(at_source, torch.Generator().manual_seed(0)).applied(at_source)
    with torch.no_grad():
        assert float((order([images])[0].cls.sort().values - got.cls.sort().values).abs().max()) < 1e-5
        for network in (at_source, order):
            prefix, alone = network.space.smallest, network.to_static(network.space.smallest)
            (inside,), (sliced,) = network([images], prefix), alone([images])
            assert float((inside.cls - sliced.cls).abs().max()) < 1e-5
    backbone = initial_network(config).backbone
    assert backbone.config.image_size == config.method.crops.global_size == 224
    assert config.method.crops.mean == model.pretrained_cfg["mean"]
    states = backbone.state_dict(), at_source.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name != "pos_embed")
    if family == "gate":
        assert_same_under_official_names(at_source, model, tmp_path / "dinov2.pth")


def assert_same_under_official_names(expected: Backbone, model: Any, file: Path) -> None:
    """A file of DINOv2 calls gates and registers something else, and its class token has a position."""
    names = {"reg_token": "register_tokens", ".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    position = torch.full((1, 1, 96), 0.5)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - position
    torch.save(state | {"mask_token": torch.zeros(1, 96)}, file)
    config = initial_config("elastic", str(file), ["head_dim=48"])  # which 384 and 1024 are no multiples of
    same_features(read_source(str(file), config.method.backbone).backbone, expected)


@pytest.mark.parametrize("family", OTHERS)
def test_other_architectures_are_refused(family: str, tmp_path: Path) -> None:
    architecture, arguments, reason = OTHERS[family]
    of_timm(tmp_path, architecture, arguments)
    with pytest.raises(InputError, match=reason):
        read_source(str(tmp_path))


@pytest.mark.parametrize("name", ["elastic-vit-s14", "elastic-vit-b14", "elastic-vit-l16"])
def test_presets_have_the_shape_of_their_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    make, config = timm.create_model, preset(name)
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained, **rest: make(*args, **rest))
    monkeypatch.setattr(
        "poa.initialization.source._require_equal", lambda *_: None
    )  # random weights, a large network
    with torch.device("meta"):
        assert initial_config(name, config.method.init.weights, {}) == config


def test_a_name_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: make(name, **SMALL, **rest))
    assert str(read_source("timm:vit_tiny_patch16_224")).startswith(
        "timm:vit_tiny_patch16_224, a vit 64x3 of 32"
    )
    monkeypatch.undo()
    with pytest.raises(
        InputError, match="timm:vit_of_nobody: expected weights that timm loads, got RuntimeError: "
    ):
        read_source("timm:vit_of_nobody")


@pytest.mark.parametrize("kind", ["vit-32x2", "resnet-32x1-2-2"])
def test_extracted_models(kind: str, models: Path) -> None:
    config = initial_config("quickstart", str(models / kind), [])
    space = config.method.backbone.space
    assert str(space.intact) == kind.partition("-")[2]
    assert str(space.smallest) == {"vit-32x2": "16x1", "resnet-32x1-2-2": "16x1-1-1"}[kind]
    backbone = initial_network(config).backbone
    same_features(backbone, read_source(str(models / kind)).backbone)


def test_files(models: Path, tmp_path: Path) -> None:
    """One with timm's names and a classifier, at another size; and an official checkpoint."""
    state = load_file(models / "vit-32x2" / "model.safetensors")
    file = tmp_path / "plain.safetensors"
    save_file(state | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}, file)
    overrides = ["head_dim=16", "image_size=48", "global_size=48"]
    config = initial_config("quickstart", str(file), overrides)
    source = read_source(str(file), config.method.backbone)
    assert str(source) == f"{file}, a vit 32x2 of 24 pixels; left out: head.bias, head.weight"
    resampled, original = (
        b.state_dict()["pos_embed"] for b in (initial_network(config).backbone, source.backbone)
    )
    assert torch.equal(resampled, positions_of_grid(original, 1, 6, 6))

    official = tmp_path / "official.pth"
    weights = golden.tensors("vit_forward", "state")
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in weights.items()}}, official)
    head_dim = golden.case("vit_forward")["config"]["head_dim"]
    config = initial_config("quickstart", str(official), [f"head_dim={head_dim}"])
    assert read_source(str(official), config.method.backbone).elastic
    config = replace(config, method=replace(config.method, head=replace(config.method.head, prototypes=(8,))))
    loaded = load_backbone(official, head_dim=head_dim)
    weights = initial_network(config).backbone.state_dict()
    different = [name for name, w in loaded.state_dict().items() if not torch.equal(w, weights[name])]
    assert different in ([], ["pos_embed"])


def test_wrong_files(models: Path, tmp_path: Path) -> None:
    state = load_file(models / "vit-32x2" / "model.safetensors")
    file, hints = tmp_path / "wrong.safetensors", tiny_config().method.backbone

    def refused(content: dict[str, torch.Tensor], reason: str) -> None:
        save_file(content, file)
        with pytest.raises(InputError, match=reason) as error:
            read_source(str(file), hints)
        assert str(file) in str(error.value) and "\n" not in str(error.value)

    lost = {name: tensor for name, tensor in state.items() if name != "blocks.1.ls1.gamma"}
    refused(lost, r"1 expected weights missing \(first: blocks.1.ls1.gamma\), 0 unknown")
    refused(state | {"extra": torch.zeros(1)}, r"0 expected weights missing .* 1 unknown \(first: extra\)")
    refused(
        state | {"norm.bias": torch.zeros(32, dtype=torch.float8_e4m3fn)}, "norm.bias: .* got torch.float8"
    )
    refused(
        state | {"norm.bias": torch.full((32,), float("nan"))}, "norm.bias: expected finite weights, got NaN"
    )
    refused({"weights": torch.zeros(2)}, "expected weights of a ViT, Swin or ResNet, got none of")
    nested = tmp_path / "nested.pth"
    torch.save({"epoch": 1, "state_dict": state}, nested)
    assert str(read_source(str(nested), hints).backbone.space.intact) == "32x2"
    torch.save({"epoch": 1, "weights": state}, nested)
    with pytest.raises(InputError, match="nested.pth: epoch: expected a tensor, got int"):
        read_source(str(nested), hints)
    (tmp_path / "empty").mkdir()
    shutil.copy(models / "vit-32x2" / "config.json", tmp_path / "empty")
    with pytest.raises(InputError, match="model.safetensors: expected a file of weights, got no such file"):
        read_source(str(tmp_path / "empty"))
    file.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="expected a complete file of weights only"):
        read_source(str(file))
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"teacher": Path("x")}))
    with pytest.raises(InputError, match="expected a complete file of weights only"):
        read_source(str(tmp_path / "model.pth"))
    with pytest.raises(InputError, match="expected a file of weights, got no such file"):
        read_source(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="expected the folder of a run or of a model, got no config.json"):
        read_source(str(tmp_path))
    with pytest.raises(InputError, match="max_width: expected a multiple of head_dim 64, got 32"):
        read_source(str(models / "vit-32x2" / "model.safetensors"))


def test_a_run_resumes_as_if_never_interrupted(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(models / "vit-32x2", tmp_path / "source")
    out = tmp_path / "run"
    start = ["pretrain", "--preset", "quickstart", "--init", str(source), "--out", str(out), *SHORT]
    assert main([*start, "--check"]) == 0 and not out.exists()
    evaluated = ["evaluate_every=1000", "knn_images=50", "method.init.images=16"]
    assert main([*start, *evaluated]) == 0
    said = capsys.readouterr().out
    assert f"weights: {source}, a vit 32x2 of 24 pixels" in said
    assert re.findall(r"importance: 20-NN accuracy of (\S+): \S+%, \S+% in a random order", said) == SUBNETS
    assert main(["pretrain", "--resume", str(out), "--importance", "none"]) == 2
    assert main([*start, *evaluated, "--auto-resume"]) == 0  # whose options have no order
    with pytest.raises(InputError, match="method.init.importance: expected none for a swin, got 'taylor'"):
        override(tiny_pyramid("swin"), ["importance=taylor"])
    shutil.rmtree(source)
    folder = RunFolder(out)
    assert sorted(folder.config().method.backbone.block_order) == [0, 1]  # type: ignore[union-attr]
    place = curves_of([folder]).axes[4]
    (level,) = [line for line in place.lines if line.get_linestyle() == "--"]
    assert level.get_ydata()[0] == folder.rows()[0]["knn"]["teacher 32x2"]
    assert place.get_title() == "20-NN accuracy (dashed: source)"
    checkpoints = folder.checkpoints()
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 6]
    whole = read_checkpoint(checkpoints[-1].path)
    checkpoints[-1].path.unlink()
    pretrain(folder.config(), out, resume=True)
    again = read_checkpoint(folder.newest().path)
    for branch in ("student", "teacher"):
        assert all(torch.equal(again[branch][name], tensor) for name, tensor in whole[branch].items())


@pytest.mark.parametrize("optimizer", ["fused", "torch"])
def test_what_is_frozen_does_not_move(optimizer: str, tmp_path: Path) -> None:
    """The backbone in the first two of six steps, that of the teacher in the first four; heads train."""
    options = [
        "freeze_backbone_epochs=1",
        "freeze_teacher_epochs=2",
        "freeze_last_layer_epochs=0",
        "save_every=1",
    ]
    config = tiny_config(*options, "keep_last=6", f"performance.optimizer={optimizer}", "loss.features=1")
    pretrain(config, tmp_path)
    folder, before = RunFolder(tmp_path), initial_network(config).state_dict()
    after = {c.step: read_checkpoint(c.path) for c in folder.checkpoints()}

    def moved(step: int, branch: str, part: str) -> bool:
        """Of all its weights but those that get no gradient: whether any did."""
        weights = {name: w for name, w in after[step][branch].items() if name.startswith(part)}
        return not all(torch.equal(w, before[name]) for name, w in weights.items())

    for branch in ("student", "teacher"):
        assert moved(2, branch, "head.") and not moved(2, branch, "backbone.")
    assert moved(4, "student", "backbone.") and not moved(4, "teacher", "backbone.")
    assert moved(6, "teacher", "backbone.")
    assert all(row["features"] > 0 for row in folder.rows())
    folder.checkpoints()[-1].path.unlink()
    pretrain(config, tmp_path, resume=True)
    again = read_checkpoint(folder.newest().path)["teacher"]
    assert all(torch.equal(again[name], tensor) for name, tensor in after[6]["teacher"].items())


def test_a_run_stops_where_the_source_is_lost(tmp_path: Path) -> None:
    config = tiny_config(
        "base_lr=1", "min_lr=1", "momentum=0", "momentum_end=0", "knn_drop=0.02", "warmup_epochs=0"
    )
    config = override(config, ["evaluate_every=3", "knn_images=200"])
    with pytest.raises(
        DivergenceError,
        match="step 3: 20-NN accuracy of teacher 32x2 fell from .* more than run.knn_drop=0.02",
    ):
        pretrain(config, tmp_path)
