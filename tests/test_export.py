"""Extracted subnets: equal to the elastic ones, to the official tool's, and readable."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import poa
from elastic_kernels import eval_crop
from helpers import golden_cases as golden
from helpers.tiny import OVERRIDES, tiny_config, tiny_modern
from poa import export
from poa.__main__ import main
from poa.backbones import Backbone, ElasticViT, ResNetConfig
from poa.data.crops import CropsConfig
from poa.data.loader import place_on_canvases
from poa.errors import InputError
from poa.files import CHECKSUM, sealed
from poa.presets import preset
from poa.subnets import Subnet

CROPS = CropsConfig(blur=(0, 0, 0))


@pytest.fixture(scope="module")
def backbone() -> ElasticViT:
    return golden.vit("vit_forward").eval()


def eight_subnets() -> list[Subnet]:
    space = golden.vit_config(golden.case("vit_forward")["config"]).space
    everything = list(space)
    spread = [everything[i] for i in np.linspace(0, len(everything) - 1, 8).astype(int)]
    assert {space.smallest, space.intact} <= set(spread)
    return list(dict.fromkeys(spread))


@pytest.mark.parametrize("subnet", eight_subnets(), ids=str)
@pytest.mark.parametrize("patches", [0, 1, 3], ids=["trained-size", "one-more", "three-more"])
def test_extracted_file_equals_the_subnet(
    subnet: Subnet, patches: int, backbone: ElasticViT, tmp_path: Path
) -> None:
    size = backbone.config.image_size + patches * backbone.config.patch_size
    path = poa.export.extract(backbone, subnet, tmp_path, CROPS, image_size=size if patches else None)
    model = poa.load(path)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (expected,) = backbone([images], subnet)
        (got,) = model.backbone([images])
        assert float((got.cls - expected.cls).abs().max()) < 1e-5
        assert float((got.patches - expected.patches).abs().max()) < 1e-5
        assert torch.equal(model(images), got.cls)
    info = model.info
    assert info["params"] == sum(p.numel() for p in model.parameters()) - patches_more(info, backbone)
    assert (info["width"], info["depth"]) == (subnet.width, subnet.depth)
    assert info["preprocessing"]["size"] == size


def patches_more(info: dict, backbone: ElasticViT) -> int:
    """Position parameters that a larger image adds to what the subnet has."""
    tokens = (info["preprocessing"]["size"] // backbone.config.patch_size) ** 2
    return (tokens + 1 - backbone.pos_embed.shape[1]) * info["width"]


@pytest.mark.parametrize("name", golden.case("extract")["results"]["vit"])
def test_golden_extract(name: str, backbone: ElasticViT) -> None:
    """The official tool's files, which lack the last norm and keep the mask token, hold our weights."""
    results = golden.case("extract")["results"]["vit"][name]
    subnet = Subnet(*results["width_depth"])
    ours = backbone.to_static(subnet).state_dict()
    file = golden.ROOT / "extract" / f"vit_{name}.safetensors"
    tool = results["extract_elastic_net"]
    assert len(ours) == tool["n_keys"] + len(tool["missing_in_static_vit"]) - len(tool["unexpected"])
    if not file.exists():  # only the keys of the largest were recorded
        return
    recorded = load_file(file)
    assert set(ours) - set(recorded) == set(tool["missing_in_static_vit"])
    assert set(recorded) - set(ours) == set(tool["unexpected"])
    for key in set(ours) & set(recorded):
        golden.assert_close(ours[key], recorded[key], relative=1e-6)


FIVE = ("channels=5", "mean=0.5,0.4,0.3,0.2,0.1", "std=0.2,0.2,0.2,0.3,0.3")
RESNETS = [Subnet(width, (a, b, 1, 1)) for width in (64, 96) for a in (1, 2) for b in (1, 2)]


def resnet() -> Backbone:
    depths = {"min_depths": (1, 1, 1, 1), "max_depths": (2, 2, 1, 1)}
    return ResNetConfig(image_size=64, max_width=96, **depths).build()


@pytest.mark.parametrize("kind", ["vit", "registers", "swiglu", "rotary", "resnet"])
def test_timm_gives_the_same_bits(kind: str, backbone: ElasticViT, tmp_path: Path) -> None:
    """Of eight subnets at two sizes, under strict names; also as parts, with classes and of other sizes."""
    timm = pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    elastic, subnets = (resnet(), RESNETS) if kind == "resnet" else (backbone, eight_subnets())
    crops = CROPS
    if kind == "registers":
        elastic = tiny_config("registers=4", *FIVE).method.backbone.build()
        subnets, crops = list(elastic.space), tiny_config(*FIVE).method.crops
    if kind == "swiglu":  # 112 * (61 / 112) is less than 61
        elastic = tiny_config("mlp=swiglu", "max_width=112", "mlp_ratio=0.5447").method.backbone.build()
        subnets = list(elastic.space)
    if kind == "rotary":
        elastic = tiny_modern("registers=2").method.backbone.build()
        subnets = list(elastic.space)
    if elastic is not backbone:
        with torch.no_grad():
            for parameter in elastic.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
    step = getattr(elastic.config, "patch_size", 32)
    sizes = [elastic.config.image_size, elastic.config.image_size + step]
    for subnet, size in itertools.product(subnets, sizes):
        if kind != "resnet" or size == sizes[0]:  # one file for all sizes
            path = export.extract(elastic, subnet, tmp_path, crops, image_size=size)
            model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
            ours = poa.load(path)
            assert model.state_dict().keys() == load_file(path / "model.safetensors").keys()
        images = torch.randn(2, len(crops.mean), size, size)
        with torch.no_grad():
            assert torch.equal(model(images), ours(images))
    size = ours.preprocess.size
    assert torch.equal(poa.load(path).to_timm()(images), model(images))
    settings = timm.data.resolve_model_data_config(model)
    assert (
        tuple(settings["input_size"]) == (len(crops.mean), size, size)
        and tuple(settings["mean"]) == crops.mean
    )
    assert round(size / settings["crop_pct"]) == crops.eval_resize(size)
    asked = {"features_only": True, "out_indices": [-1]}
    (maps,) = timm.create_model(f"local-dir:{path}", pretrained=True, **asked).eval()(images)
    with torch.no_grad():
        tokens = ours.backbone([images])[0].tokens
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens[:, -maps[0, 0].numel() :])
    larger = {} if kind == "resnet" else {"img_size": 2 * size}
    model = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=7, **larger)
    assert model(torch.randn(1, len(crops.mean), 2 * size, 2 * size)).shape == (1, 7)


def test_what_timm_does_not_have_is_not_offered_to_it(tmp_path: Path) -> None:
    for name in ("quickstart-swin", "quickstart-resnet"):
        elastic = preset(name).method.backbone.build()
        path = export.extract(elastic, elastic.space.smallest, tmp_path, CROPS)
        assert json.loads((path / "config.json").read_text()).keys() == {"poa", CHECKSUM}
        with pytest.raises(InputError, match="to_timm: timm has no such"):
            poa.load(path).to_timm()


def test_a_wrong_fold_is_refused(
    backbone: ElasticViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ElasticViT.to_static

    def wrong(*arguments):
        network = right(*arguments)
        network.blocks[0].mlp.fc2.weight.data *= 1.001
        return network

    monkeypatch.setattr(ElasticViT, "to_static", wrong)
    with pytest.raises(RuntimeError, match="differs from subnet .* nothing was written"):
        export.extract(backbone, backbone.space.smallest, tmp_path / "models", CROPS)
    assert not (tmp_path / "models").exists()


def test_wrong_requests(backbone: ElasticViT, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a width of"):
        export.extract(backbone, Subnet(17, 3), tmp_path / "models", CROPS)
    with pytest.raises(InputError, match="multiple of the patch size"):
        export.extract(backbone, backbone.space.intact, tmp_path / "models", CROPS, image_size=65)
    assert not (tmp_path / "models").exists()


def test_preprocessing_is_that_of_evaluation(backbone: ElasticViT, tmp_path: Path) -> None:
    model = poa.load(export.extract(backbone, backbone.space.smallest, tmp_path, CROPS, canvas=120))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    canvas, sizes = place_on_canvases([pixels])
    size = backbone.config.image_size
    resize = round(size / CROPS.eval_share)
    expected = eval_crop(canvas, sizes, size, CROPS.mean, CROPS.std, resize=resize)
    assert torch.equal(model.preprocess(Image.fromarray(pixels)), expected)
    assert model(model.preprocess([Image.fromarray(pixels)] * 2)).shape == (2, backbone.space.smallest.width)
    assert model.half()(Image.fromarray(pixels)).dtype == torch.float16
    for wrong, got in (
        (pixels, "files or pictures of Pillow, got ndarray"),
        (None, "files or pictures of Pillow, got NoneType"),
        (canvas, r"float \[B, 3, H, W\], got torch.uint8 \[1, 3, 90, 120\]"),
        (canvas[0].half(), r"got torch.float16 \[3, 90, 120\]"),
        (canvas[:, :1].half(), r"got torch.float16 \[1, 1, 90, 120\]"),
    ):
        with pytest.raises(InputError, match=f"images: expected .*{got}"):
            model(wrong)


def test_files_that_are_no_extracted_subnets(backbone: ElasticViT, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.safetensors: expected the folder of an extracted model or"):
        poa.load(tmp_path / "nothing.safetensors")
    path = export.extract(backbone, backbone.space.smallest, tmp_path, CROPS)
    state, config = load_file(path / "model.safetensors"), path / "config.json"
    less = {name: value for name, value in state.items() if name != "norm.bias"}
    for weights, message in (
        (state | {"extra": torch.zeros(1)}, r"1 unknown \(first: extra\)"),
        (less, r"1 expected weights missing \(first: norm.bias\)"),
        (less | {"norm.bias": torch.zeros(3)}, "norm.bias: expected shape"),
    ):
        save_file(weights, path / "model.safetensors")
        with pytest.raises(InputError, match="expected the weights of its JSON file"):
            poa.load(path)
        info = json.loads(config.read_text())
        del info[CHECKSUM]
        info["poa"]["sha256"] = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        config.write_text(json.dumps(sealed(info)))
        with pytest.raises(InputError, match=message):
            poa.load(path)
        export.extract(backbone, backbone.space.smallest, tmp_path, CROPS)


def test_a_file_of_a_former_version_is_the_same_model(backbone: ElasticViT, tmp_path: Path) -> None:
    """Weights with a JSON file of the same name beside them, whose lists of settings were shorter."""
    model = poa.load(export.extract(backbone, backbone.space.smallest, tmp_path / "new", CROPS))
    weights = tmp_path / "new" / f"vit-{model.subnet}" / "model.safetensors"
    shutil.copy(weights, tmp_path / "old.safetensors")
    pixels = {name: model.info["preprocessing"][name] for name in ("size", "resize", "mean", "std")}
    info = model.info | {"format": "poa-model-1", "preprocessing": pixels, "timm": {}}
    (tmp_path / "old.json").write_text(json.dumps(sealed(info)))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 60, 3), dtype=np.uint8))
    for path in (tmp_path / "old.safetensors", tmp_path, weights):
        assert torch.equal(poa.load(path)(picture), model(picture))


NO_SUBNETS = ["[]", "null", "{", "\xff", '{"poa": []}', '{"poa": {"format": "poa-model-2", "sha256": []}}']


@pytest.mark.parametrize("info", NO_SUBNETS)
def test_json_that_is_no_subnet(info: str, backbone: ElasticViT, tmp_path: Path) -> None:
    path = export.extract(backbone, backbone.space.smallest, tmp_path, CROPS)
    (path / "config.json").write_bytes(info.encode("latin-1"))
    with pytest.raises(InputError, match=f"{path.name}.*: expected "):
        poa.load(path)


def test_another_preprocessing_beside_the_weights(backbone: ElasticViT, tmp_path: Path) -> None:
    """One digit of the JSON file, which would change every feature."""
    path = export.extract(backbone, backbone.space.smallest, tmp_path, CROPS)
    info = path / "config.json"
    info.write_text(info.read_text().replace('"resize": ', '"resize": 1'))
    with pytest.raises(InputError, match="expected what extract wrote, got a changed file"):
        poa.load(path)


def test_a_run_its_models_and_what_is_saved_again_are_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--out", "run", *OVERRIDES]) == 0
    assert main(["extract", "run", "--subnets", "16x1", "32x2"]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    loaded = [poa.load("run", "16x1"), poa.load("run/models", "16x1"), poa.load("run/models/vit-16x1")]
    loaded[1].save("again/mine")
    loaded.append(poa.load("again"))
    for name in ("model.safetensors", "config.json"):
        assert Path(f"again/mine/{name}").read_bytes() == Path(f"run/models/vit-16x1/{name}").read_bytes()
    for model in loaded:
        assert not any(module.training for module in model.modules())
        assert model.info | {"sha256": ""} == loaded[1].info | {"sha256": ""}
        features = model(Image.open("photo.png"))
        assert features.shape == (1, 16) and torch.equal(features, loaded[0](["photo.png"]))
        assert torch.equal(features, model(model.preprocess("photo.png")))
    assert poa.load("run").info["width"] == 32
    assert not torch.equal(poa.load("run", "16x1", branch="student")("photo.png"), features)
    for place, subnet, message in (
        ("run/models", None, "run/models: expected one subnet of what lies there, got 2 of: 16x1, 32x2"),
        ("run/models", "16x2", "expected 16x2 of what lies there, got 0 of: 16x1, 32x2"),
        ("run", "16x9", "subnet 16x9: expected a width of 16, 32"),
        ("run/checkpoints", None, "expected one subnet of what lies there, got 0 of: none"),
    ):
        with pytest.raises(InputError, match=message):
            poa.load(place, subnet)
    with pytest.raises(InputError, match="save: expected the name of a folder, got mine.safetensors"):
        loaded[0].save("mine.safetensors")
