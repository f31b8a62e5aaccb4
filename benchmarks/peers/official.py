"""The official code (github.com/alipay/POA) as a peer, run from a checkout that the user names.

None of its code is here. It is imported beside ours, although both packages are called `poa`, with the
patches that recent PyTorch and a single device need; `OfficialStep.patches` lists them, and they are printed
with results.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones import ViTConfig
from poa.config import MethodConfig
from poa.errors import InputError
from poa.network import Batch, Network
from poa.official import network_name
from poa.optim import OptimConfig
from poa.subnets import Subnet


def require_checkout(folder: Path) -> None:
    """Raise ValueError unless a folder holds the official code."""
    if not (folder / "poa" / "train" / "ssl_meta_arch.py").is_file():
        raise ValueError(f"--official: expected a checkout of github.com/alipay/POA, got {folder}")


class OfficialStep:
    """A training step of the official code with the weights of one of ours; its stochastic depth is its own.

    `patches` tells what was changed so that it runs, one line each.

    Raises:
        ValueError: the folder is no checkout of the official code.
    """

    def __init__(self, checkout: Path, method: MethodConfig, device: torch.device):
        self.method, self.device = method, device
        self.patches: list[str] = []
        require_checkout(checkout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self._imported(checkout) as module:
                self.model = module.SSLMetaArch(_official_config(method)).to(device)
        for part in self.model.student:
            self.model.teacher[part].load_state_dict(self.model.student[part].state_dict())
        self.model.train()
        self.optimizer: torch.optim.Optimizer | None = None
        self.patches.append("FSDP is left out on one device; products run under autocast in its stead")
        self.model.need_to_synchronize_fsdp_streams = False
        self.alone = not dist.is_initialized()
        if self.alone:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self.patches.append("a process group of one is started, which its Sinkhorn wants")
        if device.type != "cuda":
            self.patches.append("Tensor.cuda() does nothing on a CPU")

    def close(self) -> None:
        """Leave the process group, if it was started here."""
        if self.alone:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _imported(self, checkout: Path) -> Iterator[ModuleType]:
        """The official training module; ours is back in `sys.modules` afterwards."""
        ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "poa"}
        for name in ("poa", "poa.train"):  # without their __init__, which would want the data pipeline
            package = types.ModuleType(name)
            package.__path__ = [str(checkout / name.replace(".", "/"))]
            sys.modules[name] = package
        stubs = self._install_stubs()
        try:
            operators = importlib.import_module("poa.layers.dynamic_ops")
            operators.nn = _patched_nn()  # type: ignore[attr-defined]
            self.patches.append("LayerNorm gets device and dtype by name (positions changed in torch 2.1)")
            yield importlib.import_module("poa.train.ssl_meta_arch")
        finally:
            for name in [*stubs, *(n for n in sys.modules if n.split(".")[0] == "poa")]:
                sys.modules.pop(name, None)
            sys.modules.update(ours)

    def _install_stubs(self) -> list[str]:
        """Stand-ins for missing packages, or for those whose attention does not run on the device."""
        wanted = []
        if importlib.util.find_spec("fvcore") is None:
            wanted += [name for name in STUBS if name.startswith("fvcore")]
            self.patches.append("fvcore is not installed: its checkpointer is left out")
        if importlib.util.find_spec("xformers") is None or self.device.type != "cuda":
            wanted += [name for name in STUBS if name.startswith("xformers")]
            self.patches.append("xformers does not run here: its attention is PyTorch's instead")
        for name in wanted:
            stub = types.ModuleType(name)
            stub.__dict__.update(STUBS[name])
            sys.modules[name] = stub
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, stub)
        return wanted

    def load_from(self, network: Network) -> None:
        """Take the weights of a network of ours, in both branches."""
        own = network.state_dict()
        for branch in (self.model.student, self.model.teacher):
            branch.load_state_dict({name: own[network_name(name)] for name in branch.state_dict()})

    @contextlib.contextmanager
    def without_stochastic_depth(self) -> Iterator[None]:
        """The student keeps every row while the context lasts, to compare losses."""
        blocks = [m for m in self.model.student.modules() if hasattr(m, "sample_drop_ratio")]
        ratios = [block.sample_drop_ratio for block in blocks]
        for block in blocks:
            block.sample_drop_ratio = 0.0
        try:
            yield
        finally:
            for block, ratio in zip(blocks, ratios, strict=True):
                block.sample_drop_ratio = ratio

    def load_into(self, network: Network, branch: str = "student") -> None:
        """Copy the official weights of a branch into a network of ours."""
        state = getattr(self.model, branch).state_dict()
        own = network.state_dict()
        own.update({network_name(name): value for name, value in state.items()})
        network.load_state_dict(own)

    def start_optimizer(self, config: OptimConfig) -> None:
        """AdamW over the official parameter groups, as its trainer builds it."""
        groups = self.model.get_params_groups()
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))

    def losses(
        self, batch: Batch, elastic: Subnet, temperature: float, ibot: bool = True
    ) -> dict[str, Tensor]:
        """Forward and backward of the three branches; the official dictionary of losses."""
        backbone = self.model.student.backbone
        self.model.network_ids = [backbone.networks.index((elastic.width, elastic.depth))]
        self.model.nidx = 0
        self.model.num_networks = len(backbone.networks)
        masks = batch.masks
        images = {
            "collated_global_crops": batch.global_crops,
            "collated_local_crops": batch.local_crops,
            "collated_masks": masks.mask,
            "mask_indices_list": masks.indices,
            "n_masked_patches": torch.full((1,), len(masks.indices), dtype=torch.long),
            "upperbound": len(masks.indices),
            "masks_weight": masks.weights,
        }
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.method.precision)
        with (
            warnings.catch_warnings(),
            _cuda_ignored() if self.device.type != "cuda" else contextlib.nullcontext(),
            torch.autocast(self.device.type, precision, enabled=precision is not None),
        ):
            warnings.simplefilter("ignore")  # of deprecations in the official code
            return self.model.forward_backward(images, teacher_temp=temperature, activate_ibot=ibot)

    def total(self, losses: dict[str, Tensor]) -> float:
        """The loss that was differentiated, put together again from the dictionary."""
        config, heads = self.method.loss, len(self.method.head.prototypes)
        weights = {
            "dino_local_crops_loss": config.dino,
            "dino_global_crops_loss": config.dino,
            "distill_local_crops_loss": 1 - config.intact,
            "distill_global_crops_loss": 1 - config.intact,
            "ibot_loss": 2 * config.ibot,  # the dictionary holds half of it
        }
        sums = sum(
            weight * float(losses[f"{name}_{head}"].detach()) / heads
            for name, weight in weights.items()
            for head in range(heads)
            if f"{name}_{head}" in losses
        )
        return sums + 2 * float(losses["koleo_loss"].detach() if "koleo_loss" in losses else 0.0)

    def set_rates(self, lr: float, last_layer_lr: float, weight_decay: float) -> None:
        """Learning rates and weight decay of every group, as its trainer sets them."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]
            group["weight_decay"] = weight_decay * group["wd_multiplier"]

    def step(
        self,
        batch: Batch,
        elastic: Subnet,
        temperature: float,
        momentum: float,
        clip: float,
        *,
        ibot: bool = True,
    ) -> None:
        """A whole step as its trainer does it: losses, clip, AdamW, moving average, values for the log."""
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch, elastic, temperature, ibot)
        if not math.isnan(sum(float(v.detach()) for v in losses.values())):
            for part in self.model.student.values():
                nn.utils.clip_grad_norm_(part.parameters(), clip)
            self.optimizer.step()
            with torch.no_grad():
                teacher = list(self.model.teacher.parameters())
                student = list(self.model.student.parameters())
                torch._foreach_mul_(teacher, momentum)
                torch._foreach_add_(teacher, student, alpha=1 - momentum)


@contextlib.contextmanager
def _cuda_ignored() -> Iterator[None]:
    cuda = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]


def _patched_nn() -> ModuleType:
    """`torch.nn` whose LayerNorm takes (shape, eps, elementwise_affine, device, dtype) by position."""

    class LayerNorm(nn.LayerNorm):
        def __init__(self, shape: Any, eps: float, affine: bool, device: Any = None, dtype: Any = None):
            super().__init__(shape, eps, elementwise_affine=affine, device=device, dtype=dtype)

    patched = types.ModuleType("torch.nn")
    patched.__dict__.update(nn.__dict__)
    patched.LayerNorm = LayerNorm  # type: ignore[attr-defined]
    return patched


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, **_: Any) -> Tensor:
    """`memory_efficient_attention` without a bias, `[batch, tokens, heads, d]`."""
    assert attn_bias is None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _BlockDiagonalMask:
    """The part of xformers' mask that the official heads use: concatenate, and split again."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple[_BlockDiagonalMask, Tensor]:
        return cls([t.shape[1] for t in tensors]), torch.cat(tensors, dim=1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self.lengths, dim=1))


STUBS: dict[str, dict[str, Any]] = {
    "fvcore": {},
    "fvcore.common": {},
    "fvcore.common.checkpoint": {"Checkpointer": object, "PeriodicCheckpointer": object},
    "xformers": {},
    "xformers.ops": {
        "memory_efficient_attention": _attention,
        "unbind": torch.unbind,
        "SwiGLU": nn.Module,
        "scaled_index_add": None,
        "index_select_cat": None,
    },
    "xformers.ops.fmha": {"BlockDiagonalMask": _BlockDiagonalMask},
}


def _official_config(method: MethodConfig) -> SimpleNamespace:
    """The official configuration that means the same; of a ViT."""
    if not isinstance(method.backbone, ViTConfig):
        raise InputError(f"official step: expected a backbone of kind vit, got {method.backbone.kind}")
    backbone, head, loss, crops = method.backbone, method.head, method.loss, method.crops
    heads = {
        "head_n_prototypes": head.prototypes,
        "head_bottleneck_dim": head.bottleneck,
        "head_hidden_dim": head.hidden,
        "head_nlayers": head.layers,
    }
    return SimpleNamespace(
        student=SimpleNamespace(
            arch="vit_dynamic",
            min_embed_dim=backbone.min_width,
            max_embed_dim=backbone.max_width,
            min_depth=backbone.min_depth,
            max_depth=backbone.max_depth,
            head_dim=backbone.head_dim,
            patch_size=backbone.patch_size,
            mode="order",
            layerscale=backbone.layer_scale,
            ffn_layer="mlp",
            qkv_bias=True,
            proj_bias=True,
            ffn_bias=True,
            width_interval=1,
            depth_interval=backbone.depth_step,
            net_select_scale=backbone.sampling_scale,
            drop_path_rate=backbone.drop_path,
            drop_path_uniform=backbone.drop_path_uniform,
            pretrained_weights="",
        ),
        crops=SimpleNamespace(global_crops_size=crops.global_size, local_crops_number=crops.local_count),
        dino=SimpleNamespace(
            loss_weight=loss.dino, koleo_loss_weight=loss.koleo, lambda_ie=loss.intact, **heads
        ),
        ibot=SimpleNamespace(
            loss_weight=loss.ibot,
            separate_head=False,
            mask_ratio_min_max=method.masks.ratio,
            mask_sample_probability=method.masks.probability,
        ),
        train=SimpleNamespace(centering="sinkhorn_knopp" if loss.targets == "sinkhorn" else "centering"),
        compute_precision=SimpleNamespace(grad_scaler=False),
        optim=SimpleNamespace(
            layerwise_decay=method.optim.layer_decay, patch_embed_lr_mult=method.optim.patch_embed_lr
        ),
    )
