"""Every public operator and module in a graph of `torch.compile(fullgraph=True)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import elastic_kernels as ek

# What is no operator on tensors, and why nothing of it belongs into a graph.
NO_OPERATORS = {
    "CropParameters": "holds tensors",
    "AttentionWeights": "holds tensors",
    "EmbeddingWeights": "holds tensors",
    "KeptRows": "holds tensors",
    "MlpWeights": "holds tensors",
    "Sequences": "is a layout",
    "Rotary": "is tried with attention",
    "Windows": "is a layout",
    "LayerScale": "holds a parameter",
    "elastic_block_from_vit": "makes a module",
    "elastic_block_from_timm": "makes a module",
    "sort_channels": "changes parameters once",
    "sort_heads": "changes parameters once",
    "sort_hidden": "changes parameters once",
    "sort_linear": "changes parameters once",
    "sort_middle": "changes parameters once",
    "elastic_hidden_features": "is of integers",
    "fused_adamw_backend": "is of names",
    "eval_crop": "looks at values",
    "linear_backend": "is of names",
    "NEUTRAL_CROP": "is a row of numbers",
    "absent_gpu": "stands for a device",
    "planning": "stands for autocast on meta tensors",
    "autocast_operands": "casts for meta tensors",
    "resized_positions": "a part of elastic_embedding",
    "cached_constant": "is made anew in a graph",
    "without_autocast": "is a context of PyTorch's",
    "upload": "leaves the CPU",
    "recomputed": "is tried with the blocks",
    "conv_channels_last": "is tried with the bottleneck",
    "backend": "is chosen before a graph is made",
    "check_canvases": "looks at values",
    "compilations": "counts what a graph would hide",
    "kept_activations": "is not seen by graphs",
    "GraphedModule": "makes graphs of another kind",
    "GraphPool": "holds memory",
    "shared_gradients": "orders the backward passes of autograd",
    "working_weights": "are not read by graphs",
    "FusedAdamW": "finds tensors by their addresses",
    "render_crops": "chooses its launches by values",
}

GROUPS, MAPS = [(2, 5), (1, 3)], [(1, 5, 4)]
TOKENS, WIDTH, LARGEST, HEAD_DIM = 13, 32, 48, 16

Function = Callable[..., Tensor]


def draw(*shape: int) -> Tensor:
    return (torch.randn(*shape) / 4).requires_grad_()


def kept() -> ek.KeptRows:
    rows = torch.tensor([5, 6, 7, 8, 9, 10, 11, 12])
    return ek.KeptRows(((1, 5), (1, 3)), rows, torch.full((8,), 1.5))


def linear(out: int = LARGEST, columns: int = LARGEST) -> tuple[Tensor, Tensor]:
    return draw(out, columns), draw(out)


def mlp() -> tuple[Tensor, ...]:
    return *linear(2 * LARGEST), *linear(LARGEST, 2 * LARGEST)


def norm() -> tuple[Tensor, Tensor]:
    return draw(LARGEST), draw(LARGEST)


def attention_half(layout: ek.Sequences, **options: object) -> tuple[Function, list[Tensor]]:
    def half(x: Tensor, *tensors: Tensor) -> Tensor:
        weights = ek.AttentionWeights(*tensors)
        return ek.elastic_attention_half(x, weights, layout, head_dim=HEAD_DIM, eps=1e-6, **options)

    return half, [draw(TOKENS, WIDTH), *norm(), *linear(3 * LARGEST), *linear(), draw(LARGEST)]


def window_half() -> tuple[Function, list[Tensor]]:
    def half(x: Tensor, bias: Tensor, *tensors: Tensor) -> Tensor:
        weights, windows = ek.AttentionWeights(*tensors), ek.Windows(MAPS, 3, 1, bias)
        return ek.elastic_attention_half(x, weights, windows, head_dim=HEAD_DIM, eps=1e-6)

    leaves = [draw(20, WIDTH), draw(3, 9, 9), *norm(), *linear(3 * LARGEST), *linear(), draw(LARGEST)]
    return half, leaves


def mlp_half(**options: object) -> tuple[Function, list[Tensor]]:
    def half(x: Tensor, *tensors: Tensor) -> Tensor:
        return ek.elastic_mlp_half(x, ek.MlpWeights(*tensors), eps=1e-6, **options)

    return half, [draw(TOKENS, WIDTH), *norm(), *mlp(), draw(LARGEST)]


def module(layer: torch.nn.Module, x: Tensor, *arguments: object) -> tuple[Function, list[Tensor]]:
    """Its parameters are leaves too, which `loss` finds where they are."""
    return lambda x, *parameters: layer(x, *arguments), [x, *layer.parameters()]


def mixed(function: Callable[..., Tensor], layer: torch.nn.Module) -> tuple[Function, list[Tensor]]:
    """An operator on two sequences of 16 and 32 channels, and a module."""
    widths = torch.tensor([32, 32, 16, 16, 16])
    rest = (widths,) if function is ek.mixed_width_mlp else ([(1, 2), (1, 3)], widths)
    return lambda x, *parameters: function(layer, x, *rest), [draw(5, LARGEST), *layer.parameters()]


def sinkhorn() -> tuple[Function, list[Tensor]]:
    def scaling(x: Tensor) -> Tensor:
        (log_u,) = ek.sinkhorn_scaling([x.detach()], 0.1)
        return (x * log_u).sum()

    return scaling, [draw(6, 10)]


def prototypes() -> tuple[Function, list[Tensor]]:
    teacher, targets = torch.randn(3, 10), torch.tensor([[0, -1], [1, -1], [2, -1], [0, 1]])

    def losses(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(
            ek.prototype_cross_entropy(
                [x1, x2], weight, teacher, teacher.new_zeros(10), targets, teacher_temperature=0.05
            )
        )

    return losses, [draw(4, 8), draw(4, 8), draw(10, 8)]


def under_autocast(function: Function) -> Function:
    def cast(x: Tensor, *rest: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return function(x, *rest).float()

    return cast


CASES: dict[str, Callable[[], tuple[Function, list[Tensor]]]] = {
    "elastic_linear": lambda: (ek.elastic_linear, [draw(7, WIDTH), *linear()]),
    "elastic_linear silu": lambda: (
        partial(ek.elastic_linear, out_features=40, activation="silu"),
        [draw(7, WIDTH), *linear()],
    ),
    "elastic_linear autocast": lambda: (under_autocast(ek.elastic_linear), [draw(7, WIDTH), *linear()]),
    "elastic_linear_residual": lambda: (
        partial(ek.elastic_linear_residual, rows=torch.tensor([4, 0]), row_scale=torch.ones(2)),
        [draw(2, 16), *linear(), draw(7, WIDTH), draw(LARGEST)],
    ),
    "elastic_qkv": lambda: (ek.elastic_qkv, [draw(7, WIDTH), *linear(3 * LARGEST)]),
    "elastic_mlp": lambda: (ek.elastic_mlp, [draw(7, WIDTH), *mlp()]),
    "elastic_head_mlps": lambda: (
        lambda x, a, b, c, d: sum(
            y.sum() for y in ek.elastic_head_mlps(x, [[(a, b), (c, None)], [(d, None)]])
        ),
        [draw(7, WIDTH), *linear(), draw(5, LARGEST), draw(6, LARGEST)],
    ),
    "elastic_layer_norm": lambda: (
        partial(ek.elastic_layer_norm, eps=1e-6, rows=torch.tensor([4, 0])),
        [draw(6, WIDTH), draw(LARGEST), draw(LARGEST)],
    ),
    "unit_rows": lambda: (ek.unit_rows, [draw(6, WIDTH), draw(6, 1)]),
    "elastic_embedding": lambda: (
        lambda x, *t: ek.elastic_embedding(
            [x[:1], x], ek.EmbeddingWeights(*t), WIDTH, masks=[torch.ones(1, 4) > 0, None]
        ),
        [
            draw(2, 3, 4, 4), draw(LARGEST, 3, 2, 2), draw(LARGEST), draw(1, 1, LARGEST),
            draw(1, 2, LARGEST), draw(1, 7, LARGEST), draw(1, LARGEST),
        ],
    ),
    "koleo": lambda: (partial(ek.koleo, groups=2), [draw(6, WIDTH), draw(4, LARGEST)]),
    "packed_attention": lambda: (
        partial(ek.packed_attention, groups=GROUPS),
        [draw(TOKENS, 3, 2, HEAD_DIM)],
    ),
    "window_attention": lambda: (
        partial(ek.window_attention, maps=MAPS, window=3, shift=1),
        [draw(20, 3, 2, HEAD_DIM), draw(3, 9, 9), draw(3, 3, HEAD_DIM)],
    ),
    "relative_position_bias": lambda: (partial(ek.relative_position_bias, window=3), [draw(25, 2)]),
    "elastic_group_norm": lambda: (
        lambda x, r, *t: ek.elastic_group_norm(x, *t, 2, 1e-5, residual=r, activation="relu"),
        [draw(2, 3, 4, 6), draw(2, 3, 4, 6), draw(8), draw(8)],
    ),
    "elastic_attention_half": lambda: attention_half(ek.Sequences(GROUPS)),
    "elastic_attention_half kept": lambda: attention_half(ek.Sequences(GROUPS), kept=kept()),
    "elastic_attention_half only": lambda: attention_half(
        ek.Sequences(GROUPS), only=torch.tensor([0, 9, 10])
    ),
    "elastic_attention_half windows": window_half,
    "elastic_mlp_half": mlp_half,
    "elastic_mlp_half kept": lambda: mlp_half(kept=kept()),
    "mixed_width_linear": lambda: (
        lambda x, *t: ek.mixed_width_linear(x, *t, torch.tensor([8, 32]), torch.tensor([48, 16])),
        [draw(2, LARGEST), *linear()],
    ),
    "mixed_width_layer_norm": lambda: (
        lambda x, *t: ek.mixed_width_layer_norm(x, *t, 1e-6, torch.tensor([8, 32])),
        [draw(2, LARGEST), *norm()],
    ),
    "mixed_width_rms_norm": lambda: (
        lambda x, weight: ek.mixed_width_rms_norm(x, weight, 1e-6, torch.tensor([8, 32])),
        [draw(2, LARGEST), draw(LARGEST)],
    ),
    "mixed_width_attention": lambda: mixed(
        ek.mixed_width_attention, ek.ElasticRotaryAttention(LARGEST, HEAD_DIM, qk_norm="rms")
    ),
    "mixed_width_mlp": lambda: mixed(ek.mixed_width_mlp, ek.ElasticSwiGLU(LARGEST, 30)),
    "mixed_width_block": lambda: mixed(
        ek.mixed_width_block, ek.ElasticBlock(LARGEST, 2 * LARGEST, HEAD_DIM)
    ),
    "qk_norm": lambda: (
        lambda x, *t: ek.qk_norm(x, *t, 1e-6, rotary=ek.Rotary.of_grid(1, 5, HEAD_DIM)),
        [draw(5, 3, 2, HEAD_DIM), draw(2, HEAD_DIM), draw(2, HEAD_DIM)],
    ),
    "elastic_swiglu": lambda: (
        partial(ek.elastic_swiglu, hidden=20),
        [draw(7, WIDTH), *linear(2 * LARGEST), *linear()],
    ),
    "elastic_rms_norm": lambda: (partial(ek.elastic_rms_norm, eps=1e-6), [draw(7, WIDTH), draw(LARGEST)]),
    "ElasticRMSNorm": lambda: module(ek.ElasticRMSNorm(LARGEST), draw(7, WIDTH)),
    "ElasticSwiGLU": lambda: module(ek.ElasticSwiGLU(LARGEST, 30), draw(7, WIDTH)),
    "ElasticRotaryAttention": lambda: module(
        ek.ElasticRotaryAttention(LARGEST, HEAD_DIM, qk_norm="layer"), draw(10, WIDTH), [(2, 5)], None,
        ek.Rotary.of_grid(2, 2, HEAD_DIM, prefix=1, count=2),
    ),
    "ElasticPreNormBlock": lambda: module(
        ek.ElasticPreNormBlock(
            ek.ElasticRMSNorm(LARGEST), ek.ElasticAttention(LARGEST, HEAD_DIM),
            ek.ElasticLayerNorm(LARGEST), ek.ElasticMLP(LARGEST, 30, activation="silu"),
        ),
        draw(TOKENS, WIDTH), GROUPS,
    ),
    "ElasticPatchEmbed": lambda: module(ek.ElasticPatchEmbed(2, LARGEST), draw(2, 3, 4, 4), WIDTH),
    "ElasticConv1x1": lambda: module(ek.ElasticConv1x1(LARGEST, 20), draw(2, WIDTH, 3, 2)),
    "prototype_cross_entropy": prototypes,
    "sinkhorn_scaling": sinkhorn,
    "ElasticLinear": lambda: module(ek.ElasticLinear(LARGEST, LARGEST), draw(7, WIDTH)),
    "ElasticLayerNorm": lambda: module(ek.ElasticLayerNorm(LARGEST), draw(7, WIDTH)),
    "ElasticGroupNorm": lambda: module(ek.ElasticGroupNorm(2, 8), draw(2, 3, 4, 6)),
    "ElasticAttention": lambda: module(ek.ElasticAttention(LARGEST, HEAD_DIM), draw(TOKENS, WIDTH), GROUPS),
    "ElasticMLP": lambda: module(ek.ElasticMLP(LARGEST, 2 * LARGEST), draw(7, WIDTH)),
    "ElasticBlock": lambda: module(
        ek.ElasticBlock(LARGEST, 2 * LARGEST, HEAD_DIM, layer_scale=0.5), draw(TOKENS, WIDTH), GROUPS
    ),
    "ElasticBlock kept": lambda: module(
        ek.ElasticBlock(LARGEST, 2 * LARGEST, HEAD_DIM), draw(TOKENS, WIDTH), GROUPS, (kept(), kept())
    ),
    "ElasticWindowAttention": lambda: module(
        ek.ElasticWindowAttention(LARGEST, HEAD_DIM, 3, 1), draw(20, WIDTH), MAPS
    ),
    "ElasticSwinBlock": lambda: module(
        ek.ElasticSwinBlock(LARGEST, 2 * LARGEST, HEAD_DIM, 3, 1), draw(20, WIDTH), MAPS
    ),
    "ElasticBottleneck": lambda: module(
        ek.ElasticBottleneck(8, 8, 16, 2, stride=2, shortcut=True), draw(2, 4, 4, 8), 6
    ),
}  # fmt: skip


def assert_compiles(case: str, device: str = "cpu") -> None:
    """In one graph, forward and backward, with the numbers of eager mode."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device(device):
        function, leaves = CASES[case]()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = [f(*leaves) for f in (function, compiled)]
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in outputs]
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {}
    for kind in (outputs, *zip(*grads, strict=True)):
        torch.testing.assert_close(*kind, **tolerance)
