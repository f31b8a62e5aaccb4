"""`torch.export` and ONNX of elastic blocks with symbolic numbers of sequences and tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import elastic_kernels as ek

WIDTH, LARGEST, DIM = 16, 32, 8
BATCHES = ((1, 7), (2, 5), (9, 3))


class Batched(nn.Module):
    """A block on `[B, N, w]`: B and N stay symbolic."""

    def __init__(self, block: nn.Module, **options: object):
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x: Tensor) -> Tensor:
        groups = [(x.shape[0], x.shape[1])]
        return self.block(x.flatten(0, 1), groups, **self.options).view(x.shape)


def plain() -> nn.Module:
    return Batched(ek.ElasticBlock(LARGEST, 64, DIM, layer_scale=0.5), hidden=20, heads=3)


def modern() -> nn.Module:
    attn = ek.ElasticRotaryAttention(LARGEST, DIM, qk_norm="rms")
    norms = ek.ElasticRMSNorm(LARGEST), ek.ElasticRMSNorm(LARGEST)
    return Batched(ek.ElasticPreNormBlock(norms[0], attn, norms[1], ek.ElasticSwiGLU(LARGEST, 40)))


@pytest.mark.parametrize("make", [plain, modern])
@torch.no_grad()
def test_block_of_any_batch_and_length(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().eval()
    sizes = ({0: Dim("B", min=1, max=64), 1: Dim("N", min=2, max=256)},)
    exported = export(module, (torch.randn(3, 4, WIDTH),), dynamic_shapes=sizes).module()
    for batch, length in BATCHES:
        x = torch.randn(batch, length, WIDTH)
        torch.testing.assert_close(exported(x), module(x))


@torch.no_grad()
def test_block_of_sequences_that_begin_at_offsets() -> None:
    torch.manual_seed(0)
    block = ek.ElasticBlock(LARGEST, 64, DIM)
    sizes = ({0: Dim("tokens", min=2, max=256)}, {0: Dim("ends", min=3, max=64)})
    arguments = (torch.randn(9, WIDTH), torch.tensor([0, 4, 9]))
    exported = export(block, arguments, dynamic_shapes=sizes).module()
    for lengths in ((3, 3), (1, 1, 4), (5, 0, 2, 1)):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        x = torch.randn(sum(lengths), WIDTH)
        torch.testing.assert_close(exported(x, ends), block(x, ends))


@torch.no_grad()
def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.manual_seed(0)
    module, path = plain().eval(), tmp_path / "block.onnx"
    sizes = ({0: Dim("B", min=1, max=64), 1: Dim("N", min=2, max=256)},)
    torch.onnx.export(module, (torch.randn(3, 4, WIDTH),), path, dynamic_shapes=sizes, dynamo=True)
    session = runtime.InferenceSession(path)
    for batch, length in BATCHES:
        x = torch.randn(batch, length, WIDTH)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=1e-4, atol=1e-4)
