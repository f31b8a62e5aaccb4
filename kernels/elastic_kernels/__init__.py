"""Elastic operators: transformer layers computed on prefixes of shared weights.

Every operator is stateless: the active width is read from the input, the weights are those of the largest
network, and a slice is never copied. Every operator has a plain PyTorch definition that runs on any device;
`python -m elastic_kernels` tells which of them have a faster backend here.
"""

from elastic_kernels.absent_gpu import absent_gpu
from elastic_kernels.attention import packed_attention
from elastic_kernels.blocks import ElasticBlock, ElasticBottleneck, ElasticSwinBlock
from elastic_kernels.compilations import compilations
from elastic_kernels.conversion import elastic_block_from_timm, elastic_block_from_vit
from elastic_kernels.crops import NEUTRAL_CROP, CropParameters, render_crops
from elastic_kernels.dispatch import (
    autocast_operands,
    backend,
    cached_constant,
    planning,
    upload,
    without_autocast,
)
from elastic_kernels.embedding import EmbeddingWeights, elastic_embedding, resized_positions
from elastic_kernels.graphs import GraphedModule, GraphPool
from elastic_kernels.group_norm import elastic_group_norm
from elastic_kernels.halves import AttentionWeights, MlpWeights, elastic_attention_half, elastic_mlp_half
from elastic_kernels.kept_activations import kept_activations
from elastic_kernels.koleo import koleo
from elastic_kernels.layer_norm import elastic_layer_norm
from elastic_kernels.layouts import KeptRows, Sequences, Windows
from elastic_kernels.linear import elastic_linear, elastic_linear_residual, elastic_qkv, linear_backend
from elastic_kernels.mixed_width import mixed_width_layer_norm, mixed_width_linear, mixed_width_rms_norm
from elastic_kernels.mixed_width_blocks import mixed_width_attention, mixed_width_block, mixed_width_mlp
from elastic_kernels.mlp import elastic_head_mlps, elastic_hidden_features, elastic_mlp, elastic_swiglu
from elastic_kernels.modules import (
    ElasticAttention,
    ElasticGroupNorm,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticMLP,
    ElasticWindowAttention,
    LayerScale,
    conv_channels_last,
)
from elastic_kernels.optimizer import FusedAdamW, fused_adamw_backend
from elastic_kernels.prototypes import prototype_cross_entropy, sinkhorn_scaling
from elastic_kernels.qk_norm import qk_norm
from elastic_kernels.recompute import recomputed
from elastic_kernels.resample import check_canvases, eval_crop
from elastic_kernels.rms_norm import elastic_rms_norm
from elastic_kernels.rotary import Rotary
from elastic_kernels.shared_gradients import shared_gradients
from elastic_kernels.sorting import sort_channels, sort_heads, sort_hidden, sort_linear, sort_middle
from elastic_kernels.unit_rows import unit_rows
from elastic_kernels.vit_layers import (
    ElasticConv1x1,
    ElasticPatchEmbed,
    ElasticPreNormBlock,
    ElasticRMSNorm,
    ElasticRotaryAttention,
    ElasticSwiGLU,
)
from elastic_kernels.window_attention import relative_position_bias, window_attention
from elastic_kernels.working_weights import working_weights

__version__ = "0.1.0"
__all__ = [
    "AttentionWeights", "CropParameters", "ElasticAttention", "ElasticBlock", "ElasticBottleneck",
    "ElasticConv1x1", "ElasticGroupNorm", "ElasticLayerNorm", "ElasticLinear", "ElasticMLP",
    "ElasticPatchEmbed", "ElasticPreNormBlock", "ElasticRMSNorm", "ElasticRotaryAttention", "ElasticSwiGLU",
    "ElasticSwinBlock", "ElasticWindowAttention", "EmbeddingWeights", "FusedAdamW", "GraphPool",
    "GraphedModule", "KeptRows", "LayerScale", "MlpWeights", "NEUTRAL_CROP", "Rotary", "Sequences", "Windows",
    "absent_gpu", "autocast_operands", "backend", "cached_constant", "check_canvases", "compilations",
    "conv_channels_last", "elastic_attention_half", "elastic_block_from_timm", "elastic_block_from_vit",
    "elastic_embedding", "elastic_group_norm", "elastic_head_mlps", "elastic_hidden_features",
    "elastic_layer_norm", "elastic_linear", "elastic_linear_residual", "elastic_mlp", "elastic_mlp_half",
    "elastic_qkv", "elastic_rms_norm", "elastic_swiglu", "eval_crop", "fused_adamw_backend",
    "kept_activations", "koleo", "linear_backend", "mixed_width_attention", "mixed_width_block",
    "mixed_width_layer_norm", "mixed_width_linear", "mixed_width_mlp", "mixed_width_rms_norm",
    "packed_attention", "planning", "prototype_cross_entropy", "qk_norm", "recomputed",
    "relative_position_bias", "render_crops", "resized_positions", "shared_gradients", "sinkhorn_scaling",
    "sort_channels", "sort_heads", "sort_hidden", "sort_linear", "sort_middle", "unit_rows", "upload",
    "window_attention", "without_autocast", "working_weights",
]  # fmt: skip
