"""Every kind of backbone goes through the whole: training, resuming, evaluation, export, planning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import poa
from helpers.golden_cases import assert_close
from helpers.run_folders import assert_same, assert_same_run, newest, rows, run_of
from helpers.tiny import ONE_STEP, tiny_config, tiny_modern, tiny_pyramid
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.config import Config
from poa.errors import InputError
from poa.export import extract
from poa.memory import predict_memory
from poa.optim import Schedules
from poa.options import from_dict, to_dict
from poa.presets import PRESETS, preset
from poa.step import TrainingState, train_step
from poa.subnets import Subnet
from poa.train import pretrain

KINDS = ("swin", "resnet", "modern")


def config_of(kind: str, *overrides: str) -> Config:
    """Of a tiny run; `modern` is a ViT with the parts of DINOv3."""
    if kind == "modern":
        return tiny_modern(*overrides)
    return tiny_pyramid(kind, *(["method.backbone.drop_path=0.3"] if kind == "swin" else []), *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each kind, made when it is first asked for."""

    @cache
    def run(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "run"
        pretrain(config_of(kind), folder)
        return folder

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bitwise(kind: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    whole, resumed = trained(kind), tmp_path / "run"
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert rows(whole)[-1]["elastic.ibot.0"] > 0
    shutil.copytree(whole, resumed)
    RunFolder(resumed).newest().path.unlink()
    assert RunFolder(resumed).newest().step == 3
    pretrain(RunFolder(resumed).config(), resumed, resume=True)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_models(
    kind: str, trained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("poa.evaluate.linear.FEWEST_STEPS", 10)
    run, config = str(trained(kind)), config_of(kind)
    space = config.method.backbone.space
    assert main(["evaluate", run, "--subnets", str(space.smallest), "--linear", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["extract", run, "--subnets", str(space.smallest), str(space.intact)]) == 0
    network, _ = RunFolder(trained(kind)).network()
    for path, subnet in zip(capsys.readouterr().out.split(), (space.smallest, space.intact), strict=True):
        model = poa.load(path)
        images = torch.randn(2, 3, config.method.backbone.image_size, config.method.backbone.image_size)
        with torch.no_grad():
            (features,) = network.backbone([images], subnet)
            assert_close(model(images), features.cls)
        assert model.info["params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_nothing(kind: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    pretrain(config_of(kind, "performance.recompute=true"), tmp_path / "recomputed")
    assert_same(*(newest(run)["teacher"] for run in (trained(kind), tmp_path / "recomputed")))
    assert rows(trained(kind)) == rows(tmp_path / "recomputed")


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_agrees_on_the_first_loss(
    kind: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    pretrain(config_of(kind, *ONE_STEP, "method.precision=bf16"), tmp_path / "run")
    exact, rounded = (rows(run)[0]["loss"] for run in (trained(kind), tmp_path / "run"))
    assert exact != rounded == pytest.approx(exact, rel=5e-3)  # measured: 0.1 and 0.2 %


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str, tmp_path: Path) -> None:
    """Plain DDP waits for one from each."""
    config = config_of(kind, "method.optim.ibot_start_epoch=0", "performance.optimizer=torch")
    run, state = run_of(config, tmp_path), TrainingState.start(config, torch.device("cpu"))
    (canvases,) = next(run.batches(range(1)))
    micro_batch = run.prepare(0, 0, canvases)
    schedules = Schedules.build(config.method.optim, config.method.optim.epoch_steps, 8)
    train_step(state.student, state, config, schedules, 0, [micro_batch])
    assert [name for name, p in state.student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_match_the_network(kind: str) -> None:
    config = (tiny_modern() if kind == "modern" else preset(f"quickstart-{kind}")).method.backbone
    network = config.build()
    for subnet in config.space:
        assert config.parameters(subnet) == sum(p.numel() for p in network.to_static(subnet).parameters())
        half = [] if kind == "modern" else [config.image_size // 2]  # positions of a ViT cost a product
        for size in (config.image_size, *half):
            images = torch.zeros(1, 3, size, size)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                network([images], subnet)
            counts = counter.get_flop_counts()["Global"]
            # The bias of windows comes from a table by a product with a matrix of zeros and ones.
            tables = sum(2 * n * n * t * h for n, t, h in tables_of(config, subnet))
            assert sum(counts.values()) - tables == config.flops(subnet, size)


@pytest.mark.parametrize("name", ["quickstart", "quickstart-swin", "quickstart-resnet"])
def test_planning_leaves_no_constants_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a forward of tensors without values, in a size of its own, the real one has values."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it looks at values
    config = preset(name).method.backbone
    shape = (1, 3, 5 * config.image_size, 3 * config.image_size)
    with FakeTensorMode():
        config.build()([torch.zeros(shape)])
    (features,) = config.build()([torch.zeros(shape)])
    assert type(features.cls.detach()) is torch.Tensor


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_an_extracted_network_that_became_elastic_is_extracted_again(kind: str) -> None:
    intact = tiny_pyramid(kind).method.backbone.build().eval()
    source = intact.to_static(intact.space.intact)
    elastic = source.config.halved().build().eval()
    elastic.load_state_dict(source.state_dict())
    images, smallest = [torch.randn(2, 3, 32, 32)], elastic.space.smallest
    assert smallest.width < elastic.space.intact.width and smallest.blocks < elastic.space.intact.blocks
    with torch.no_grad():
        (expected,), (alone,) = elastic(images, smallest), elastic.to_static(smallest).eval()(images)
    torch.testing.assert_close(alone.cls, expected.cls, rtol=1e-4, atol=1e-5)


def tables_of(config: object, subnet: Subnet) -> list[tuple[int, int, int]]:
    """Tokens of a window, rows of the table and heads of each block with such a table."""
    if not isinstance(config, poa.SwinConfig):
        return []
    n, rows = config.window**2, (2 * config.window - 1) ** 2
    heads = [config.max_width // config.head_dim * 2**stage for stage in range(len(subnet.blocks))]
    return [(n, rows, h) for h, depth in zip(heads, subnet.blocks, strict=True) for _ in range(depth)]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_predicted(kind: str) -> None:
    config = tiny_modern() if kind == "modern" else preset({"swin": "swin-b", "resnet": "resnet-152"}[kind])
    few, many = (predict_memory(config, images).peak for images in (4, 8))
    assert few < many < 2 * few


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_a_file(name: str) -> None:
    config = preset(name)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_names_of_subnets() -> None:
    assert Subnet.parse("64x3-4-6-3") == Subnet(64, (3, 4, 6, 3))
    assert str(Subnet(64, (3, 4, 6, 3))) == "64x3-4-6-3"
    space = preset("resnet-152").method.backbone.space
    with pytest.raises(InputError, match=r"a depth of 3-\(4..8 step 1\)-\(6..36 step 1\)-3"):
        space.require(Subnet(64, (3, 4, 37, 3)))
    with pytest.raises(InputError, match="such as 384x12 or 64x3-4-6-3"):
        Subnet.parse("64x3--3")
    with pytest.raises(InputError, match="backbone.kind: expected one of vit, swin, resnet, got 'mlp'"):
        from_dict(Config, {"method": {"backbone": {"kind": "mlp"}}})


def test_registers_attend_and_are_no_output(tmp_path: Path) -> None:
    """They are trained, stand between class token and patches, and an extracted model has them."""
    config = tiny_config("method.backbone.registers=3", "method.optim.ibot_start_epoch=0").method.backbone
    network = config.build(torch.Generator().manual_seed(0))
    small, size = config.space.smallest, config.image_size
    images = [torch.randn(2, 3, size, size), torch.randn(3, 3, 16, 16)]
    features = network(images, small)
    patches = config.grid(size) ** 2
    assert features[0].patches.shape[1] == patches and features[0].tokens.shape[1] == 4 + patches
    wanted = torch.tensor([0, config.grid(16) ** 2])  # the first patches of the first two images
    read = network.gather_tokens(images, wanted, small)
    expected = [f.cls for f in features] + [features[1].patches[:2, 0]]
    torch.testing.assert_close(read, torch.cat(expected))
    sum(f.cls.square().sum() for f in features).backward()
    assert network.reg_token.grad[..., : small.width].abs().min() > 0
    assert config.parameters(small) == sum(p.numel() for p in network.to_static(small).parameters())
    path = extract(network.eval(), small, tmp_path, preset("quickstart").method.crops, image_size=2 * size)
    assert poa.load(path)(torch.randn(1, 3, 2 * size, 2 * size)).shape == (1, small.width)
    assert config.timm_model().arguments["reg_tokens"] == 3
