"""The cost model against PyTorch's FLOP counter, bytes counted by hand, and the floor of its design."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.roofline import H200, Summary, Workload
from poa.config import preset
from poa.data.masking import draw_masks
from poa.multicrop import draw_stochastic_depth
from poa.random import python_stream, torch_stream
from poa.subnets import Subnet
from poa.tribranch import Batch, Centers, Network, StudentPass, teacher_targets, tribranch_loss

METHOD = preset("vit-s16").method
IMAGES = 5  # so that stochastic depth keeps whole crops: 8 of 10 and 32 of 40


def counted_flops(subnet: Subnet) -> int:
    """Of a whole step on tensors without values, by PyTorch."""
    crops = METHOD.crops
    dice = python_stream(METHOD.seed, "masks", 0, 0)
    masks = draw_masks(2 * IMAGES, (14, 14), METHOD.masks.probability, METHOD.masks.ratio, dice)
    groups, passes = Workload.of(METHOD, IMAGES).groups(student=True), []
    for network in (METHOD.backbone.space.intact, subnet):
        rates = [METHOD.backbone.drop_path] * network.depth
        passes.append(StudentPass(network, draw_stochastic_depth(groups, rates, torch_stream(0, "test"))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = Network(METHOD.backbone, METHOD.head), Network(METHOD.backbone, METHOD.head)
        batch = Batch(
            torch.empty(2 * IMAGES, 3, crops.global_size, crops.global_size),
            torch.empty(crops.local_count * IMAGES, 3, crops.local_size, crops.local_size),
            masks,
        )
        with FlopCounterMode(display=False) as counter:
            centers = Centers.zeros(METHOD.head.prototypes, torch.device("cpu"))
            (targets,) = teacher_targets(teacher, [batch], 0.05, METHOD.loss, centers)
            intact, elastic = student(batch, passes)
            tribranch_loss(intact, elastic, targets, batch, METHOD.loss)[0].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("subnet", ["192x6", "192x12", "256x9", "320x7", "384x6", "384x12"])
def test_flops_agree_with_the_counter_of_pytorch(subnet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it looks at values
    work = Workload.of(METHOD, IMAGES)
    model = Summary.of(roofline.step(work, Subnet.parse(subnet)), H200).flops
    assert model == pytest.approx(counted_flops(Subnet.parse(subnet)), rel=0.01)


def test_bytes_by_hand() -> None:
    """ViT-L, 64 images: 102 x 197 + 409 x 37 = 35,227 rows of 1024 channels take part in a block."""
    work = Workload(preset("vit-l16").method, 64, 3726, stream_bytes=4)
    costs = {(c.phase, c.kernel): c for c in roofline.block(work, "intact", 1024)}
    rows = 35_227
    assert roofline.tokens(work.kept(student=True)) == rows
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


def test_parameters_are_those_of_the_network() -> None:
    with torch.device("meta"):
        network = Network(METHOD.backbone, METHOD.head)
    unmasked = sum(p.numel() for name, p in network.named_parameters() if "mask_token" not in name)
    assert roofline.parameters(METHOD) == unmasked


def test_report() -> None:
    text = roofline.report(Workload(METHOD, IMAGES, 100), H200)
    assert "fc2 dgrad + gelu" in text
    assert "MFU" in text
