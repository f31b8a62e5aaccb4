"""Pretrained weights from timm, from a model of this project or from a file, as an elastic backbone.

Every tensor is placed or named; at full size the backbone computes what the source does, which is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones import Backbone, BackboneConfig, ElasticViT, ResNetConfig, ViTConfig
from poa.backbones.positions import positions_of_grid
from poa.errors import InputError, optional_package
from poa.export import load
from poa.export.model import CONFIG, TOLERANCE, WEIGHTS
from poa.files import read_json
from poa.official import backbone_from_state, backbone_name, backbone_state, of_branch
from poa.options import shown
from poa.weights import load_strictly, read_weights

TIMM = "timm:"
OFFICIAL = {"register_tokens": "reg_token", ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}  # DINOv2's
CLASSIFIER = re.compile(r"(head|fc)\.(weight|bias)")
AXIAL = "RotaryEmbeddingCat"  # EVA's, of which each pair of channels follows rows or columns
OF_MEAN = "it was pooled by the mean of patch tokens, so its class token may know little"
ROTARY = ("RotaryEmbeddingDinoV3", AXIAL)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""What a source computes of images: `Features.cls` and `Features.patches`."""


@dataclass(frozen=True)
class Source:
    """Pretrained weights.

    Attributes:
        name: where they come from.
        backbone: they themselves, of one size, in float32 on the CPU.
        elastic: whether prefixes of them were trained, so that their order must stay.
        normalisation: mean and standard deviation of the pixels by channel, where the source says them.
        left_out: names of tensors that no backbone has: those of a classifier.
        note: what else should be known of it.
    """

    name: str
    backbone: Backbone
    elastic: bool = False
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    left_out: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        config = self.backbone.config
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        note = f"; {self.note}" if self.note else ""
        shape = f"a {config.kind} {config.space.intact} of {config.image_size} pixels"
        return f"{self.name}, {shape}{left_out}{note}"

    @torch.no_grad()
    def place_into(self, backbone: Backbone) -> None:
        """Load the weights into a backbone of the same shape, which may take images of another size.

        A position embedding is resampled to its grid. A mask token that the source lacks stays as it is.

        Raises:
            InputError: another shape.
        """
        source, state = self.backbone, self.backbone.state_dict()
        if isinstance(source, ElasticViT) and "pos_embed" in state:
            side = backbone.config.grid(backbone.config.image_size)
            state["pos_embed"] = positions_of_grid(source.pos_embed, source.config.prefix, side, side)
        mine = backbone.state_dict()
        state |= {name: mine[name] for name in ("mask_token",) if name in mine and name not in state}
        load_strictly(backbone, state, self.name)


def is_run(name: str) -> bool:
    """Whether it names the folder of a run."""
    path = Path(name)
    return bool(name) and (path / CONFIG).is_file() and (path / "checkpoints").is_dir()


def read_source(name: str, hints: BackboneConfig | None = None) -> Source:
    """Read pretrained weights.

    Args:
        name: `timm:NAME`, the folder of a model of `poa extract` or of timm, or a file of weights with the
            names of timm or of an official POA checkpoint.
        hints: tells of a file what shapes do not: `head_dim` of a ViT, `norm_groups` of a ResNet.

    Raises:
        InputError: nothing of these; tensors missing, unknown or not of a floating dtype above 8 bits; or an
            architecture that computes something else at full size.
    """
    path = Path(name)
    if name.startswith(TIMM):
        source, reference = _of_timm(name, name.removeprefix(TIMM))
    elif not path.is_dir():
        source, reference = _of_file(name, hints or ViTConfig())
    elif not (path / CONFIG).is_file():
        raise InputError(f"{name}: expected the folder of a run or of a model, got no {CONFIG} in it")
    elif not (path / WEIGHTS).is_file():
        raise InputError(f"{path / WEIGHTS}: expected a file of weights, got no such file")
    elif "poa" in read_json(path / CONFIG, f"{name}: expected the JSON file of a model"):
        source, reference = _of_extracted(name)
    else:
        _require_floats(read_weights(path / WEIGHTS), str(path / WEIGHTS))
        source, reference = _of_timm(name, f"local-dir:{path}")
    _require_equal(source, reference)
    return source


def _of_timm(name: str, architecture: str) -> tuple[Source, Reference]:
    timm = optional_package("timm", "timm")
    try:
        model = timm.create_model(architecture, pretrained=True, num_classes=0).eval()
    except Exception as error:
        why = shown(" ".join(str(error).split()), 400)  # names of tensors are on lines of their own
        raise InputError(
            f"{name}: expected weights that timm loads, got {type(error).__name__}: {why}"
        ) from None
    state, groups = model.state_dict(), getattr(getattr(model, "bn1", None), "num_groups", None)
    if isinstance(model, timm.models.VisionTransformer | timm.models.Eva):
        backbone: Backbone = _vit_of_timm(name, model, state)
    elif isinstance(model, timm.models.ResNet) and groups:
        backbone = backbone_from_state(_under_our_names(state), name=name, norm_groups=groups)
    else:
        raise InputError(
            f"{name}: expected a VisionTransformer, an Eva or a ResNet with group norm of timm, got a "
            f"{type(model).__name__}"
        )

    def reference(images: Tensor) -> tuple[Tensor, Tensor]:
        features = model.forward_features(images)
        if features.dim() == 3:
            features = model.fc_norm(features) if _is_of_mean(model) else features
            return features[:, 0], features[:, model.num_prefix_tokens :]
        maps = F.interpolate(features, scale_factor=ResNetConfig.mask_scale)
        return features.mean((2, 3)), maps.flatten(2).transpose(1, 2)

    pixels, note = model.pretrained_cfg, OF_MEAN if _is_of_mean(model) else ""
    normalisation = tuple(pixels["mean"]), tuple(pixels["std"])
    return Source(name, backbone, normalisation=normalisation, note=note), reference


def _vit_of_timm(name: str, model: Any, state: dict[str, Tensor]) -> Backbone:
    rope: Any = getattr(model, "rope", None)
    block = model.blocks[0]
    kind = type(rope).__name__
    if rope is not None and kind not in ROTARY:
        raise InputError(f"{name}: expected a rotary embedding of {', '.join(ROTARY)}, got {kind}")
    state = _under_our_names(state, model.no_embed_class)
    if kind == AXIAL:
        _turn_halves(state, block.attn.num_heads, rope.rotate_half, rope.grid_indexing == "xy")
    vit = backbone_from_state(state, name=name, head_dim=block.attn.head_dim)
    options: dict[str, Any] = {"norm_eps": block.norm1.eps}
    if "pos_embed" not in state:
        options["image_size"] = model.patch_embed.img_size[0]
    if kind == AXIAL:
        options["positions"] = "learned-axial" if "pos_embed" in state else "axial"
        options["axial_temperature"] = float(rope.temperature)
        options["axial_grid"] = (rope.ref_feat_shape or (0,))[0]
    backbone = vit.config.changed(**options).build()
    backbone.load_state_dict(vit.state_dict())
    return backbone


def _is_of_mean(model: Any) -> bool:
    """Whether a ViT of timm has its last norm after the mean of the patch tokens, instead of before it."""
    pooled = getattr(model, "fc_norm", None)
    return isinstance(pooled, nn.Module) and not isinstance(pooled, nn.Identity)


def _turn_halves(state: dict[str, Tensor], heads: int, halves: bool, columns_first: bool) -> None:
    """Let a rotary embedding turn pairs (i, i + d / 2) of which the first half are of rows.

    Products of queries and keys do not change, as both have their channels in the new order.

    Args:
        state: of a ViT whose pairs are neighbours, or such `halves`.
        heads: of attention.
        columns_first: the first half of its pairs are of columns.
    """
    for name in [name for name in state if ".attn.qkv." in name]:
        qk, v = state[name].tensor_split([state[name].shape[0] * 2 // 3])
        by_head = qk.unflatten(0, (2 * heads, -1))
        pairs = by_head.unflatten(1, (2, -1) if halves else (-1, 2))
        first, second = pairs.unbind(1 if halves else 2)  # [2 heads, d / 2, ...]
        if columns_first:
            first, second = (part.roll(part.shape[1] // 2, 1) for part in (first, second))
        state[name] = torch.cat([torch.cat([first, second], 1).flatten(0, 1), v])


def _of_extracted(name: str) -> tuple[Source, Reference]:
    model = load(name)
    backbone, pixels = model.config.build(), model.preprocess
    load_strictly(backbone, backbone_state(_under_our_names(model.backbone.state_dict())), name)
    return Source(name, backbone, normalisation=(pixels.mean, pixels.std)), _features_of(model.backbone)


def _of_file(name: str, hints: BackboneConfig) -> tuple[Source, Reference]:
    """Of a state dict: an official checkpoint, or one with timm's names."""
    content = of_branch(read_weights(Path(name)), "teacher", name)
    left_out = tuple(key for key in content if CLASSIFIER.fullmatch(key))
    state = {key: tensor for key, tensor in content.items() if key not in left_out}
    _require_floats(state, name)
    _require_known_positions(state, name)
    sizes = {key: getattr(hints, key) for key in ("head_dim", "norm_groups") if hasattr(hints, key)}
    backbone = backbone_from_state(_under_our_names(backbone_state(state)), name=name, **sizes)
    elastic = any(backbone_name(key) != key for key in state)
    static = backbone.to_static(backbone.space.intact)
    plain = static.config.plain()
    load_strictly(plain, static.exported_state(), name)
    return Source(name, backbone, elastic, None, left_out), _features_of(plain)


def _require_known_positions(state: Mapping[str, Tensor], name: str) -> None:
    """Raise InputError where a file may be of a rotary embedding that its tensors do not tell."""
    endings = {key.rpartition("blocks.0.")[2] for key in state}
    of_eva = "pos_embed" in state and endings & {"attn.q_bias", "attn.q_proj.weight", "mlp.fc1_g.weight"}
    of_rope = "cls_token" in state and "pos_embed" not in state and "attn.qkv.bias" in endings
    if of_eva or of_rope:
        raise InputError(
            f"{name}: expected weights whose names tell the position embedding, got those of timm's Eva; "
            "name timm:NAME or the folder of the model"
        )


def _features_of(network: nn.Module) -> Reference:
    def reference(images: Tensor) -> tuple[Tensor, Tensor]:
        (features,) = network([images])
        return features.cls, features.patches

    return reference


def _under_our_names(state: Mapping[str, Tensor], padded: bool | None = None) -> dict[str, Tensor]:
    """timm's tensors under the names of this project; those that a ViT may lack, such that nothing changes.

    Args:
        state: of a network of timm.
        padded: whether the position embedding of a ViT lacks rows for class token and registers; None: as
            the others are a square, perhaps for the registers alone.
    """
    placed = {_our_name(name): tensor for name, tensor in state.items()}
    if "norm.weight" not in placed:
        placed = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in placed.items()}
    if "cls_token" not in placed:
        return placed
    width = placed["cls_token"].shape[-1]
    _join(placed)
    if not any(name.endswith((".ls1.gamma", ".ls2.gamma")) for name in placed):
        blocks = {name.split(".")[1] for name in placed if name.startswith("blocks.")}
        placed |= {f"blocks.{n}.ls{half}.gamma": torch.ones(width) for n in blocks for half in (1, 2)}
    if "pos_embed" not in placed:
        return placed
    prefix = 1 + (placed["reg_token"].shape[1] if "reg_token" in placed else 0)
    positions = placed["pos_embed"]
    lacked = (0, prefix, prefix - 1) if padded is None else (prefix if padded else 0,)
    patches = {rows: positions.shape[1] + rows - prefix for rows in lacked}
    rows = next((rows for rows, count in patches.items() if math.isqrt(max(count, 0)) ** 2 == count), 0)
    own = positions[:, : prefix - rows], positions[:, prefix - rows :]
    placed["pos_embed"] = torch.cat([own[0], positions.new_zeros(1, rows, width), own[1]], dim=1)
    return placed


def _join(placed: dict[str, Tensor]) -> None:
    """Make one tensor of gates and units, and of biases of queries, keys and values, which timm keeps apart.

    Biases that are zeros everywhere, as DINOv3's, are left out.
    """
    biases = [tensor for name, tensor in placed.items() if name.endswith((".attn.q_bias", ".attn.v_bias"))]
    biased = any(bool(bias.any()) for bias in biases)
    for name in list(placed):
        if ".mlp.fc1_g." in name:
            units = placed.pop(name.replace("fc1_g", "fc1_x"))
            placed[name.replace("fc1_g", "fc1")] = torch.cat([placed.pop(name), units])
        elif name.endswith(".attn.q_bias"):
            q, v = placed.pop(name), placed.pop(name.replace("q_bias", "v_bias"))
            if biased:
                placed[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])


def _our_name(name: str) -> str:
    """Of a tensor of timm or of DINOv2's own files."""
    for theirs, ours in OFFICIAL.items():
        name = name.replace(theirs, ours)
    name = re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name)
    return re.sub(r"(^|\.)bn(\d)", r"\1norm\2", name)


def _require_floats(state: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: {key}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{name}: {key}: expected one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise InputError(f"{name}: {key}: expected finite weights, got NaN or inf")


@torch.no_grad()
def _require_equal(source: Source, reference: Reference) -> None:
    """Compare both networks on random images of the source's size."""
    config = source.backbone.config
    size = config.image_size
    images = torch.randn(2, config.channels, size, size, generator=torch.Generator().manual_seed(0))
    (ours,), theirs = source.backbone.eval()([images]), reference(images)
    pairs = zip((ours.cls, ours.patches), theirs, strict=True)
    worst = max(float((x - y).abs().max() / max(1.0, float(y.abs().max()))) for x, y in pairs)
    if not worst < TOLERANCE:  # also where it is NaN
        raise InputError(
            f"{source.name}: expected an architecture that computes the same here, got features that differ "
            f"by {worst:.2e}; it has another activation, norm or attention"
        )
