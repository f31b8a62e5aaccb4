"""Module wrappers and half-blocks: composed of the operators, stateless about the subnet; wrong use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import elastic_kernels as ek

C, HIDDEN, HEAD = 32, 128, 16
GROUPS = [(2, 5), (3, 2)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class PlainAttention(nn.Module):
    """As timm's, in its parts that count here."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = C // HEAD
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.q_norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, HEAD)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    """A timm-style ViT block."""

    def __init__(self, layer_scale: bool = True, act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-3), nn.LayerNorm(C, eps=1e-5)
        self.attn = PlainAttention()
        self.mlp = nn.Sequential()
        for name, part in (
            ("fc1", nn.Linear(C, HIDDEN)),
            ("act", act or nn.GELU()),
            ("fc2", nn.Linear(HIDDEN, C)),
        ):
            self.mlp.add_module(name, part)
        scales = [ek.LayerScale(C, 0.1 * n) if layer_scale else nn.Identity() for n in (1, 2)]
        self.ls1, self.ls2 = scales

    def forward(self, x: Tensor) -> Tensor:
        factor = [getattr(scale, "gamma", 1) for scale in (self.ls1, self.ls2)]
        x = x + factor[0] * self.attn(self.norm1(x))
        return x + factor[1] * self.mlp(self.norm2(x))


@pytest.mark.parametrize("layer_scale", [True, False])
def test_block_from_a_vit_shares_its_parameters(layer_scale: bool) -> None:
    plain = PlainBlock(layer_scale)
    block = ek.elastic_block_from_vit(plain)
    mine, theirs = dict(block.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    x = draw(2, 5, C)
    torch.testing.assert_close(block(x.flatten(0, 1), [(2, 5)]).view(x.shape), plain(x))
    assert block(draw(10, 16), [(2, 5)]).shape == (10, 16)


def test_block_from_timm() -> None:
    try:
        from timm.models.vision_transformer import Block
    except (ImportError, RuntimeError):
        pytest.skip("timm does not import here")
    plain = Block(C, C // HEAD, init_values=0.1).eval()
    x = draw(2, 5, C)
    torch.testing.assert_close(
        ek.elastic_block_from_vit(plain)(x.flatten(0, 1), [(2, 5)]).view(x.shape), plain(x)
    )


def changed(change: Callable[[Any], None]) -> PlainBlock:
    block = PlainBlock()
    change(block)
    return block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: setattr(b.attn, "q_norm", nn.LayerNorm(HEAD)), "expected no q_norm, got LayerNorm"),
        (lambda b: setattr(b.mlp, "act", nn.GELU("tanh")), "expected an exact nn.GELU, got GELU"),
        (lambda b: setattr(b, "ls2", nn.Identity()), "both or neither, got one of them"),
        (
            lambda b: setattr(b.attn, "qkv", nn.Linear(C, C)),
            r"expected qkv \[96, 32\] for 2 equal heads, got",
        ),
        (lambda b: setattr(b, "extra", nn.Linear(1, 1)), "differs in extra.bias, extra.weight"),
    ],
)
def test_blocks_that_are_not_plain(change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ek.elastic_block_from_vit(changed(change))


@pytest.mark.parametrize("width", [16, 32])
def test_modules_are_the_operators(width: int) -> None:
    x = draw(16, width)
    linear, norm = ek.ElasticLinear(C, 24), ek.ElasticLayerNorm(C, eps=1e-3)
    assert torch.equal(linear(x, 7), ek.elastic_linear(x, linear.weight, linear.bias, out_features=7))
    rows = torch.tensor([3, 1])
    assert torch.equal(norm(x, rows), ek.elastic_layer_norm(x, norm.weight, norm.bias, 1e-3, rows=rows))
    mlp = ek.ElasticMLP(C, HIDDEN)
    hidden = F.gelu(F.linear(x * (C / width), mlp.fc1.weight[: 4 * width, :width], mlp.fc1.bias[: 4 * width]))
    expected = F.linear(hidden * (C / width), mlp.fc2.weight[:width, : 4 * width], mlp.fc2.bias[:width])
    torch.testing.assert_close(mlp(x), expected)
    attention = ek.ElasticAttention(C, HEAD)
    qkv = ek.elastic_qkv(x, attention.qkv.weight, attention.qkv.bias).unflatten(-1, (-1, HEAD))
    expected = attention.proj(ek.packed_attention(qkv, GROUPS), width)
    assert torch.equal(attention(x, GROUPS), expected)


def test_two_widths_share_a_checkpointed_block() -> None:
    block = ek.ElasticBlock(C, HIDDEN, HEAD)
    inputs = [draw(16, width) for width in (C, HEAD)]
    sums = [
        sum(
            (checkpoint(block, x, GROUPS, use_reentrant=False) if recompute else block(x, GROUPS)).sin().sum()
            for x in inputs
        )
        for recompute in (False, True)
    ]
    stored, again = (torch.autograd.grad(total, list(block.parameters())) for total in sums)
    for a, b in zip(stored, again, strict=True):
        assert torch.equal(a, b)


X, W = torch.zeros(4, 16), torch.zeros(32, 32)
NORM = (torch.ones(32), torch.zeros(32))
INDEX = torch.zeros(4, 2, dtype=torch.int64)


def half(layout: ek.Sequences | ek.Windows, head_dim: int = 16) -> Tensor:
    weights = ek.AttentionWeights(*NORM, W.repeat(3, 1), torch.zeros(96), W, None, None)
    return ek.elastic_attention_half(X, weights, layout, head_dim=head_dim, eps=1e-6)


def window_half(**changes) -> Tensor:
    """A right call, but for the changes."""
    sizes = {"maps": [(1, 2, 2)], "size": 2, "shift": 0, "bias": torch.zeros(1, 4, 4)} | changes
    return half(ek.Windows(**sizes))


@pytest.mark.parametrize("width", [16, 32])
def test_windowed_attention_is_that_of_its_block(width: int) -> None:
    """The attention half is the module on the normalised stream, added to it."""
    torch.manual_seed(0)
    block, maps = ek.ElasticSwinBlock(32, 64, 16, 2, 1), [(2, 3, 3)]
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(18, width)
    torch.testing.assert_close(block(x, maps), x + block.attn(block.norm1(x), maps))


def prototypes(students: list[Tensor], logits: Tensor = X[:, :8], targets: Tensor = INDEX) -> list[Tensor]:
    weight, scale = torch.zeros(8, 16), torch.zeros(8)
    return ek.prototype_cross_entropy(students, weight, logits, scale, targets, teacher_temperature=0.1)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "width": (lambda: ek.elastic_linear(torch.zeros(4, 40), W), ValueError, r"in in 1\.\.32, got 40"),
    "out": (lambda: ek.elastic_linear(X, W, out_features=33), ValueError, r"out_features in 1\.\.32, got 33"),
    "dtype": (lambda: ek.elastic_linear(X.half(), W), TypeError, "x torch.float16, weight torch.float32"),
    "integers": (lambda: ek.elastic_linear(X.long(), W), TypeError, "floating-point x, got torch.int64"),
    "device": (lambda: ek.elastic_linear(X, W.to("meta")), ValueError, "x on cpu, weight on meta"),
    "activation": (
        lambda: ek.elastic_linear(X, W, activation="relu"),
        ValueError,
        "one of 'gelu', 'gelu_tanh', 'silu', got 'relu'",
    ),
    "qkv": (lambda: ek.elastic_qkv(X, W, None), ValueError, r"weight \[3 \* heads \* d, C\], got \(32, 32\)"),
    "rows": (
        lambda: ek.elastic_linear_residual(X, W, None, X, rows=torch.tensor([1])),
        ValueError,
        "expected 1 rows of x, got 4",
    ),
    "row indices": (
        lambda: ek.elastic_linear_residual(X, W, None, X, rows=torch.tensor([1.0])),
        ValueError,
        "rows int64",
    ),
    "mlp": (lambda: ek.elastic_mlp(X, W, None, W[:, :8], None), ValueError, "expected fc2_weight"),
    "norm": (lambda: ek.elastic_layer_norm(X, W[0], None, 1e-6), ValueError, "both or neither"),
    "head": (
        lambda: half(ek.Sequences([(1, 4)]), 12),
        ValueError,
        r"qkv_weight \[3 \* heads \* 12, C\], got",
    ),
    "heads": (lambda: half(ek.Sequences([(1, 4)]), 32), ValueError, "multiple of head_dim 32, got 16"),
    "groups": (lambda: half(ek.Sequences([(1, 5)])), ValueError, r"expected 4 tokens, got 5 in \[5\] of Seq"),
    "maps": (lambda: window_half(maps=[(1, 2, 3)]), ValueError, r"expected 4 tokens, got 6 in \[6\] of Win"),
    "window bias": (lambda: window_half(size=3), ValueError, r"bias \[1 or more, 9, 9\], got \(1, 4, 4\)"),
    "shift": (lambda: window_half(shift=2), ValueError, "a shift in 0..1, got 2"),
    "module": (lambda: ek.ElasticAttention(40, 16), ValueError, "multiple of head_dim 16, got 40"),
    "batches": (
        lambda: ek.ElasticBlock(32, 64, 16)(X[None], [(1, 4)]),
        ValueError,
        r"x \[tokens, width\], packed as x.flatten\(0, 1\), got \[1, 4, 16\]",
    ),
    "lengths": (
        lambda: ek.packed_attention(X.view(4, 1, 1, 16).expand(4, 3, 1, 16), [2, 2]),  # type: ignore[list-item]
        ValueError,
        r"groups: expected \[\(count, length\), ...\] or a tensor of offsets, got \[2, 2\]",
    ),
    "negative": (lambda: half(ek.Sequences([(-2, -2)])), ValueError, r"groups: .*, got \[\(-2, -2\)\]"),
    "float": (
        lambda: ek.elastic_linear(X, W, out_features=16.0),  # type: ignore[arg-type]
        ValueError,
        r"out_features in 1\.\.32, got 16.0",
    ),
    "gather": (
        lambda: ek.elastic_layer_norm(X[None], *NORM, 1e-6, rows=INDEX[:, 0]),
        ValueError,
        r"rows int64 \[kept\] of x \[tokens, width\], got torch.int64 \[4\] and x \[1, 4, 16\]",
    ),
    "stride": (
        lambda: ek.elastic_rms_norm(X, NORM[0], 1e-6, rows=INDEX[:, 0]),
        ValueError,
        "stride 1, .* got 2",
    ),
    "images": (
        lambda: ek.ElasticPatchEmbed(4, 8)(torch.zeros(2, 3, 10, 8), 8),
        ValueError,
        r"images \[B, 3, H, W\], sides multiples of 4, got \[2, 3, 10, 8\]",
    ),
    "maps of channels": (
        lambda: ek.ElasticConv1x1(8, 8)(torch.zeros(3, 2, 2)),
        ValueError,
        r"\[N, in, H, W\]",
    ),
    "widths": (
        lambda: ek.mixed_width_block(ek.ElasticBlock(16, 32, 16), X, [(1, 4)], [16] * 4),  # type: ignore[arg-type]
        ValueError,
        r"mixed_width_block: expected widths int64 \[4\], got list",
    ),
    "kind": (
        lambda: ek.mixed_width_block(nn.Linear(1, 1), X, [(1, 4)], INDEX[:, 0]),  # type: ignore[arg-type]
        TypeError,
        "an ElasticBlock or ElasticPreNormBlock, got Linear",
    ),
    "students": (lambda: prototypes([]), ValueError, "one or two students, got 0"),
    "student": (lambda: prototypes([X, X[:3]]), ValueError, r"student 1 \(4, 16\), got \(3, 16\)"),
    "student dtype": (
        lambda: prototypes([X.half()]),
        TypeError,
        "student 0 torch.float16, weight torch.float32",
    ),
    "targets": (lambda: prototypes([X], targets=INDEX[:3]), ValueError, r"targets \(4, 2\), got \(3, 2\)"),
    "parts": (
        lambda: ek.prototype_cross_entropy(
            [X], W[:8, :16], [X[:, :8]], [X[0, :8]], [INDEX, INDEX], teacher_temperature=1.0
        ),
        ValueError,
        "of each part, got 1, 1, 2",
    ),
    "target dtype": (
        lambda: prototypes([X], targets=INDEX.int()),
        TypeError,
        "int64 targets, got torch.int32",
    ),
    "logits": (lambda: prototypes([X], logits=X), ValueError, r"teacher_logits \(4, 8\), got \(4, 16\)"),
    "sinkhorn": (
        lambda: ek.sinkhorn_scaling([X[0]], 0.1),
        ValueError,
        r"logits \[rows, prototypes\], got \(16,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_wrong_use_is_the_same_on_every_device() -> None:
    """Checks come before the dispatch: tensors without values show it."""
    with pytest.raises(ValueError, match=r"in in 1\.\.32, got 40"):
        ek.elastic_linear(torch.zeros(4, 40, device="meta"), W.to("meta"))
    assert ek.elastic_linear(X.to("meta"), W.to("meta")).shape == (4, 32)


@pytest.mark.parametrize("size", [0, -64, 64.0, "64"])
def test_modules_have_sizes_of_at_least_1(size: Any) -> None:
    made: dict[str, Callable[[], object]] = {
        "width": lambda: ek.ElasticBlock(size, 256, 16),
        "hidden": lambda: ek.ElasticSwinBlock(64, size, 16, 3, 0),
        "head_dim": lambda: ek.ElasticAttention(64, size),
        "heads": lambda: ek.ElasticWindowAttention(64, 16, 3, 0, heads=size),
        "window": lambda: ek.ElasticWindowAttention(64, 16, size, 0),
        "groups": lambda: ek.ElasticBottleneck(64, 16, 64, size),
        "in_features": lambda: ek.ElasticLinear(size, 64),
        "out_channels": lambda: ek.ElasticConv1x1(64, size),
        "patch_size": lambda: ek.ElasticPatchEmbed(size, 64),
    }
    for name, make in made.items():
        with pytest.raises(ValueError, match=f"expected {name}, an integer of at least 1, got {size!r}"):
            make()
    with pytest.raises(ValueError, match=r"expected shift in 0..2, got 3"):
        ek.ElasticSwinBlock(64, 256, 16, 3, 3)
