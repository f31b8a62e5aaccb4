"""`python -m elastic_kernels`: versions, devices, and the backend that each operator would take."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from elastic_kernels import dispatch
from elastic_kernels.attention import attention_backend
from elastic_kernels.crops import crops_backend
from elastic_kernels.group_norm import group_norm_backend
from elastic_kernels.layer_norm import layer_norm_backend
from elastic_kernels.linear import linear_backend
from elastic_kernels.optimizer import fused_adamw_backend
from elastic_kernels.window_attention import window_attention_backend

LINEARS = ("elastic_linear", "elastic_linear_residual", "elastic_mlp", "elastic_mlp_half", "elastic_qkv")


def main() -> None:
    """Print the report."""
    for package in ("torch", "triton", "xformers"):
        there = importlib.util.find_spec(package) is not None
        print(f"{package:<10} {importlib.metadata.version(package) if there else 'not installed'}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{'device':<10} {torch.cuda.get_device_name() if cuda else 'cpu'}")
    dtype = torch.bfloat16 if cuda else torch.float32
    print(f"\nbackends for {dtype} on {device.type}:")
    x = torch.empty(197, 384, dtype=dtype, device=device)
    choices = {op: linear_backend(op, x) for op in LINEARS}
    choices["elastic_layer_norm"] = layer_norm_backend(x)
    choices |= {
        op: attention_backend(x, [(1, 197)], 64) for op in ("packed_attention", "elastic_attention_half")
    }
    choices["window_attention"] = window_attention_backend(x, 7, 16)
    choices["elastic_group_norm"] = group_norm_backend(x, 32)
    choices |= {op: dispatch.choose(op, x) for op in ("prototype_cross_entropy", "sinkhorn_scaling")}
    choices["FusedAdamW"] = fused_adamw_backend(x.float())
    choices["render_crops"] = crops_backend(x)
    for op, choice in choices.items():
        print(f"  {op:<29} {choice.backend:<11} {choice.reason}")


if __name__ == "__main__":
    main()
