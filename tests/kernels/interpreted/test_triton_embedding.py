"""The Triton kernels of the embedding under Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

import elastic_kernels as ek
import elastic_kernels.triton_ops.embedding  # noqa: F401, registers the operators
from helpers.kernels.embedding_cases import LAYERS, assert_accurate, assert_layer_accurate
from helpers.kernels.numerics import DTYPES, draw, opcheck


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "registers", "masked"), [(5, 0, True), (9, 2, False), (9, 1, True)])
def test_tokens_and_gradients(width: int, registers: int, masked: bool, dtype: torch.dtype) -> None:
    assert_accurate(width, 9, registers, masked, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_patches_and_1x1_convolutions(kind: str, dtype: torch.dtype) -> None:
    assert_layer_accurate(kind, dtype)


def test_registered_operators() -> None:
    ops = torch.ops.elastic_kernels
    mask = torch.ones(2, 4, dtype=torch.uint8)
    groups = [3, 2], [None, mask], [draw(1, 4).float(), None]
    positions, token = draw(6, 8).float(), draw(8).float()
    y = draw(11, 5).half()
    opcheck((ops.embedding_fwd, (y, positions[:2], positions, token, *groups)))
    arguments = (draw(21, 5).float(), positions, token, *groups, 2, torch.half)
    opcheck((ops.embedding_bwd, arguments))


def test_wrong_use() -> None:
    weights = ek.EmbeddingWeights(
        *(torch.zeros(s) for s in ((8, 3, 2, 2), (8,), (1, 1, 8))), None, torch.zeros(1, 2, 8)
    )
    images = [torch.zeros(1, 3, 2, 2)]
    with pytest.raises(ValueError, match=r"expected width in 1..8, got 9"):
        ek.elastic_embedding(images, weights, 9)
    with pytest.raises(ValueError, match="expected None for a ViT without a mask token, got a mask"):
        ek.elastic_embedding(images, weights, 8, masks=[torch.ones(1, 1) > 0])
