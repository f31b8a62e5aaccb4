"""How many binaries the Triton kernels need for all subnets: few, or every new shape would compile.

Blocks of all widths run forward and backward on meta tensors, through the launchers, on the H100 nobody has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from triton.runtime.jit import JITFunction

from elastic_kernels import (
    ElasticBlock,
    ElasticBottleneck,
    ElasticPreNormBlock,
    ElasticRMSNorm,
    ElasticRotaryAttention,
    ElasticSwiGLU,
    ElasticSwinBlock,
    KeptRows,
    absent_gpu,
    backend,
    kept_activations,
    mixed_width_block,
)
from elastic_kernels.dispatch import planning
from elastic_kernels.triton_ops import (
    layer_norm,
    linear,
    linear_dgrad,
    linear_persistent,
    linear_wgrad,
    vector_grads,
)
from elastic_kernels.triton_ops.recorded import Launches

IMAGES = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23, 31, 32, 48, 53, 64, 96, 127, 128)  # 20 token counts
FEW_IMAGES = (1, 5, 16, 64)


@pytest.fixture
def launches() -> Iterator[Launches]:
    with absent_gpu("sm_90") as launches, planning(torch.bfloat16):
        yield launches


def binaries(launches: Launches) -> Counter[str]:
    """How many of each kernel that was used."""
    counts = Counter(binary.name for binary in launches.binaries)
    print(counts, counts.total())
    return counts


def kept(groups: tuple[tuple[int, int], ...]) -> KeptRows:
    """Four fifths of each group."""
    groups = tuple((max(count * 4 // 5, 1), length) for count, length in groups)
    rows = torch.arange(sum(count * length for count, length in groups), device="meta")
    return KeptRows(groups, rows, rows.float())


def run_all_widths(block: ElasticBlock, few_or_many: Sequence[int] = IMAGES) -> None:
    """The 143 subnets of ViT-L/16: depths share their blocks' binaries."""
    for width, images in product(range(384, 1025, 64), few_or_many):
        teacher, student = ((2 * images, 197),), ((2 * images, 197), (8 * images, 37))
        tokens = [sum(count * length for count, length in groups) for groups in (teacher, student)]
        with torch.no_grad():
            block(torch.empty(tokens[0], width, device="meta"), teacher)
        for choice in (None, (kept(student), kept(student))):
            x = torch.empty(tokens[1], width, device="meta", requires_grad=True)
            block(x, student, choice).sum().backward()


def test_all_subnets_of_a_vit_need_few_binaries(launches: Launches) -> None:
    with torch.device("meta"):
        block = ElasticBlock(1024, 4096, 64, layer_scale=1e-5)
    with backend("triton"):
        run_all_widths(block)  # fp32 weights, whose corners are rounded for every product
        for linear_layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            linear_layer.bfloat16()
        run_all_widths(block)  # bf16 weights, read in place
        with kept_activations():
            run_all_widths(block, FEW_IMAGES)
    counts = binaries(launches)
    modules = (layer_norm, linear, linear_dgrad, linear_persistent, linear_wgrad, vector_grads)
    kernels = {k for m in modules for k, f in vars(m).items() if isinstance(f, JITFunction)}
    unused = {name for name in kernels if name.endswith("_kernel")} - counts.keys()
    assert unused == {"_linear_persistent_kernel"}  # which tables of timed settings choose
    assert "_attention_bwd_kernel" in counts
    assert counts.total() < 60


def test_all_subnets_of_a_swin_need_few_binaries(launches: Launches) -> None:
    """Every stage and width of Swin-B, with global and local crops: stages share their kernels too."""
    with torch.device("meta"):
        blocks = [
            [ElasticSwinBlock(128 * 2**stage, 512 * 2**stage, 16, 7, shift) for shift in (0, 3)]
            for stage in range(4)
        ]
    with backend("triton"):
        for stage, width, images in product(range(4), (96, 112, 128), FEW_IMAGES):
            maps = [(8 * images, 24 >> stage, 24 >> stage), (2 * images, 56 >> stage, 56 >> stage)]
            groups = tuple((count, height * wide) for count, height, wide in maps)
            tokens = sum(count * length for count, length in groups)
            for block, choice in product(blocks[stage], (None, (kept(groups), kept(groups)))):
                x = torch.empty(tokens, width * 2**stage, device="meta", requires_grad=True)
                block(x, maps, choice).sum().backward()
    counts = binaries(launches)
    assert counts["_window_attention_fwd_kernel"] == counts["_window_attention_bwd_kernel"] == 1
    assert counts.total() < 60


def test_all_subnets_of_a_resnet_need_few_binaries(launches: Launches) -> None:
    """Every stage and width of ResNet-152: a group has 2 to 64 channels."""
    with torch.device("meta"):
        blocks = [
            [
                ElasticBottleneck(256 * 2**stage, 128 * 2**stage, 256 * 2**stage, 32, shortcut=shortcut)
                for shortcut in (False, True)
            ]
            for stage in range(4)
        ]
    with backend("triton"):
        for stage, width, images in product(range(4), (64, 96, 128), FEW_IMAGES):
            for block, side in product(blocks[stage], (56 >> stage, 24 >> stage)):
                x = torch.empty(images, side, side, 256 * 2**stage, device="meta", requires_grad=True)
                block(x, width * 2**stage).sum().backward()
    counts = binaries(launches)
    assert counts.keys() >= {"_group_norm_fwd_kernel", "_group_norm_bwd_kernel"}
    assert counts.total() < 60


def test_every_size_of_any_network_needs_few_binaries(launches: Launches) -> None:
    """Width, hidden units, heads, scale, offsets and widths of rows are run-time arguments."""
    with torch.device("meta"):
        plain = [ElasticBlock(768, 3072, 64, layer_scale=0.1, scale=scale) for scale in ("offset", None, 0.7)]
        attn = ElasticRotaryAttention(768, 64, qk_norm="rms")
        norms = ElasticRMSNorm(768), ElasticRMSNorm(768)
        modern = ElasticPreNormBlock(norms[0], attn, norms[1], ElasticSwiGLU(768, 2048))
    with backend("triton"):
        for width, hidden, heads, images in product((384, 640, 768), (512, 1536), (3, 6), FEW_IMAGES):
            for block in plain:
                x = torch.empty(images * 197, width, device="meta", requires_grad=True)
                block(x, [(images, 197)], hidden=hidden, heads=heads).sum().backward()
            x = torch.empty(images * 300, width, device="meta", requires_grad=True)
            ends = torch.empty(images + 1, dtype=torch.int64, device="meta")
            modern(x, ends, hidden=hidden, heads=heads).sum().backward()
        for rows in IMAGES:
            x = torch.empty(rows, 768, device="meta", requires_grad=True)
            widths = torch.empty(rows, dtype=torch.int64, device="meta")
            mixed_width_block(modern, x, [(rows, 1)], widths).sum().backward()
    counts = binaries(launches)
    assert counts.keys() >= {"_attention_blocks_bwd_kernel", "_mixed_width_kernel", "_layer_norm_bwd_kernel"}
    assert counts["_qk_norm_fwd_kernel"] == counts["_qk_norm_bwd_kernel"] == 1
    assert counts.total() < 60
