"""The cost model against PyTorch's FLOP counter, bytes counted by hand, and the floor of its design."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.__main__ import main
from benchmarks.roofline import H200, Summary, Workload, vit
from benchmarks.roofline.swin import positions
from poa.backbones import ViTConfig
from poa.config import MethodConfig
from poa.masks import draw_masks
from poa.multicrop import draw_stochastic_depth
from poa.network import Batch, Network, StudentPass
from poa.options import override
from poa.presets import preset
from poa.random import python_stream, torch_stream
from poa.subnets import Subnet
from poa.tribranch import Centers, teacher_targets, tribranch_loss

METHODS = {
    "vit": preset("vit-s16").method,
    # A Swin's stochastic depth keeps a random number of crops; here it keeps all.
    "swin": override(preset("swin-b"), ["method.backbone.drop_path=0"]).method,
    "resnet": preset("resnet-152").method,
}
METHOD = METHODS["vit"]
SUBNETS = {
    "vit": ["192x6", "256x9", "384x12"],
    "swin": ["96x2-2-6-2", "112x2-2-9-2", "128x2-2-18-2"],
    "resnet": ["64x3-4-6-3", "96x3-5-17-3", "128x3-8-36-3"],
}
META = torch.device("meta")
IMAGES = 5  # so that a ViT's stochastic depth keeps whole crops: 8 of 10 and 32 of 40


def student_pass(method: MethodConfig, subnet: Subnet) -> StudentPass:
    """With the stochastic depth of a ViT."""
    config = method.backbone
    if not isinstance(config, ViTConfig):
        return StudentPass(subnet)
    groups = vit.groups(config, Workload.of(method, IMAGES), student=True)
    rates = [config.drop_path] * subnet.blocks[0]
    return StudentPass(subnet, draw_stochastic_depth(groups, rates, torch_stream(0, "test"), META))


@functools.cache
def networks(kind: str) -> tuple[Network, Network]:
    """Student and teacher without values."""
    method = METHODS[kind]
    with META:
        student, teacher = (Network(method.backbone, method.head) for _ in range(2))
    return student, teacher


def batch_of(method: MethodConfig) -> Batch:
    """Crops and masks without values."""
    crops = method.crops
    dice, side = python_stream(method.seed, "masks", 0, 0), method.backbone.grid(crops.global_size)
    masks = draw_masks(2 * IMAGES, (side, side), method.masks.probability, method.masks.ratio, dice)
    return Batch(
        torch.empty(2 * IMAGES, 3, crops.global_size, crops.global_size, device=META),
        torch.empty(crops.local_count * IMAGES, 3, crops.local_size, crops.local_size, device=META),
        masks.to(META),
    )


@functools.cache
def flops_of_the_largest_step(kind: str) -> int:
    """Of a whole step whose elastic student is the intact one, by PyTorch."""
    method, (student, teacher) = METHODS[kind], networks(kind)
    batch, intact = batch_of(method), student_pass(method, method.backbone.space.intact)
    with FlopCounterMode(display=False) as counter:
        centers = Centers.zeros(method.head.prototypes, META)
        (targets,) = teacher_targets(teacher, [batch], 0.05, method.loss, centers)
        outputs = student(batch, [intact, intact])
        tribranch_loss(*outputs, targets, batch, method.loss)[0].backward()
    return counter.get_total_flops()


@functools.cache
def flops_of_a_student(kind: str, subnet: Subnet) -> int:
    """Of its forward up to the prototypes, and of the backward from there, by PyTorch."""
    method, (student, _) = METHODS[kind], networks(kind)
    with FlopCounterMode(display=False) as counter:
        (output,) = student(batch_of(method), [student_pass(method, subnet)])
        torch.autograd.backward(output.features, [torch.empty_like(x) for x in output.features])
    return counter.get_total_flops()


def counted_flops(kind: str, subnet: Subnet) -> int:
    """Of a whole step on tensors without values, by PyTorch: steps differ by their elastic student."""
    intact = METHODS[kind].backbone.space.intact
    others = flops_of_the_largest_step(kind) - flops_of_a_student(kind, intact)
    return others + flops_of_a_student(kind, subnet)


@pytest.mark.parametrize(("kind", "subnet"), [(kind, name) for kind in SUBNETS for name in SUBNETS[kind]])
def test_flops_agree_with_the_counter_of_pytorch(kind: str, subnet: str) -> None:
    elastic = Subnet.parse(subnet)
    model = Summary.of(roofline.step(Workload.of(METHODS[kind], IMAGES), elastic), H200).flops
    assert model == pytest.approx(counted_flops(kind, elastic), rel=0.01)


def test_bytes_by_hand() -> None:
    """ViT-L, 64 images: 102 x 197 + 409 x 37 = 35,227 rows of 1024 channels take part in a block."""
    method, rows = preset("vit-l16").method, 35_227
    config, work = method.backbone, Workload(method, 64, 3726, stream_bytes=4)
    assert isinstance(config, ViTConfig)
    costs = {(c.phase, c.kernel): c for c in vit.block(config, work, "intact", 1024).costs()}
    assert vit.tokens(vit.kept(config, work, student=True)) == rows
    assert costs["forward", "norm 1"].bytes == rows * 1024 * (4 + 2)
    assert costs["forward", "attention"].bytes == rows * 1024 * 2 * (3 + 1)
    qkv = rows * 1024 * 2 + 3 * 1024 * 1024 * 2 + rows * 3 * 1024 * 2
    assert costs["forward", "qkv"].bytes == qkv
    assert costs["backward", "fc1 wgrad"].bytes == rows * (1024 + 4096) * 2 + 4096 * 1024 * 4


def test_floor_of_the_design() -> None:
    """146.3 ms, 268 GB; 104.1 TFLOP as specified: ViT-L/16, 64 images, a bf16 stream, on an H200."""
    method = preset("vit-l16").method
    total = Summary.of(roofline.mean_step(Workload(method, 64, 3726, stream_bytes=2)), H200)
    assert total.floor == pytest.approx(146.3e-3, rel=0.03)
    assert total.overlap == pytest.approx(130.5e-3, rel=0.03)
    assert total.bytes == pytest.approx(268e9, rel=0.03)
    specified = Summary.of(roofline.mean_step(Workload(method, 64, 3726, skip_dead_tokens=False)), H200)
    assert specified.flops == pytest.approx(104.1e12, rel=0.01)


@pytest.mark.parametrize(("gpu", "images_per_s"), [("h200", 425), ("h100", 394)])
def test_bound_of_each_gpu(gpu: str, images_per_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-L/16, 64 images, an fp32 stream: the most that the design can reach."""
    assert main(["roofline", "--gpu", gpu]) == 0
    printed = capsys.readouterr().out
    assert gpu.upper() in printed.splitlines()[1]
    (line,) = (line for line in printed.splitlines() if line.startswith("floor "))
    assert float(line.partition("a step,")[2].split()[0]) == pytest.approx(images_per_s, abs=1)


def test_bytes_of_a_swin_by_hand() -> None:
    """Swin-B, 64 images: 128 maps of 56 and 512 of 24 positions a side; blocks keep 1 to 0.8 of them."""
    work = Workload(preset("swin-b").method, 64, 3726)
    costs = roofline.step(work, work.method.backbone.space.intact)
    blocks = [c.bytes for c in costs if (c.part, c.kernel) == ("intact", "norm 2") and c.phase == "forward"]
    rows, rates = positions([(128, 56), (512, 24)]), torch.linspace(0, 0.2, 24).tolist()
    assert len(blocks) == 24
    assert blocks[0] == rows * 128 * (4 + 2)
    assert blocks[1] == pytest.approx((1 - rates[1]) * rows * 128 * (4 + 2))
    assert blocks[-1] == pytest.approx(0.8 * positions([(128, 7), (512, 3)]) * 1024 * (4 + 2))
    merging = [c.bytes for c in costs if (c.part, c.kernel) == ("intact", "merging")]
    after = positions([(128, 28), (512, 12)])
    assert merging[0] == after * 512 * 2 + 512 * 256 * 2 + after * 256 * 4


def test_bytes_of_a_resnet_by_hand() -> None:
    """ResNet-152, 64 images: the last stage has 128 maps of 7 and 512 of 3 positions a side."""
    work = Workload(preset("resnet-152").method, 64, 3726)
    costs = roofline.step(work, Subnet(96, (3, 4, 6, 3)))
    last = [c for c in costs if (c.part, c.phase, c.kernel) == ("elastic", "backward", "norm 3")]
    one = 512 * 9 * 2048 * 2 * 5  # read: gradient, input, output; written: two gradients
    assert [c.bytes for c in last[-2:]] == [one, 2 * one]  # the first block, and two alike
    wgrads = [c.bytes for c in costs if (c.part, c.kernel) == ("elastic", "conv2 wgrad")]
    rows, middle = 512 * 9, 8 * 96
    assert wgrads[-1] == 2 * (2 * rows * middle * 2 + 2 * 4 * 9 * middle**2)


@pytest.mark.parametrize("kind", METHODS)
def test_parameters_are_those_of_the_network(kind: str) -> None:
    method = METHODS[kind]
    with torch.device("meta"):
        network = Network(method.backbone, method.head)
    unmasked = sum(p.numel() for name, p in network.named_parameters() if "mask_token" not in name)
    assert roofline.parameters(method) == unmasked


def test_report() -> None:
    text = roofline.report(Workload(METHOD, IMAGES, 100), H200)
    assert "fc2 dgrad + gelu" in text
    assert "MFU" in text
