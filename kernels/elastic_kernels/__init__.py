"""Elastic operators: transformer layers computed on prefixes of shared weights.

Every operator is stateless: the active width is read from the input, the weights are those of the largest
network, and a slice is never copied. Every operator but `render_crops`, which needs Triton, has a plain
PyTorch definition that runs on any device;
`python -m elastic_kernels` tells which of them have a faster backend here.
"""

from elastic_kernels.attention import packed_attention
from elastic_kernels.block import (
    AttentionWeights,
    KeptRows,
    MlpWeights,
    Sequences,
    Windows,
    elastic_attention_half,
    elastic_mlp_half,
)
from elastic_kernels.compilations import compilations
from elastic_kernels.crops import CropParameters, crops_backend, render_crops
from elastic_kernels.dispatch import backend
from elastic_kernels.group_norm import elastic_group_norm
from elastic_kernels.layer_norm import elastic_layer_norm
from elastic_kernels.linear import elastic_linear, elastic_linear_residual, elastic_qkv
from elastic_kernels.mlp import elastic_hidden_features, elastic_mlp
from elastic_kernels.modules import (
    ElasticAttention,
    ElasticBlock,
    ElasticBottleneck,
    ElasticGroupNorm,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticMLP,
    ElasticSwinBlock,
    ElasticWindowAttention,
    LayerScale,
    elastic_block_from_vit,
)
from elastic_kernels.optimizer import FusedAdamW
from elastic_kernels.prototypes import prototype_cross_entropy, sinkhorn_scaling
from elastic_kernels.shared_gradients import shared_gradients
from elastic_kernels.window_attention import relative_position_bias, window_attention
from elastic_kernels.working_weights import working_weights

__all__ = [
    "AttentionWeights",
    "ElasticAttention",
    "ElasticBlock",
    "ElasticBottleneck",
    "ElasticGroupNorm",
    "ElasticLayerNorm",
    "ElasticLinear",
    "ElasticMLP",
    "ElasticSwinBlock",
    "ElasticWindowAttention",
    "CropParameters",
    "FusedAdamW",
    "KeptRows",
    "LayerScale",
    "MlpWeights",
    "Sequences",
    "Windows",
    "backend",
    "compilations",
    "crops_backend",
    "elastic_attention_half",
    "elastic_block_from_vit",
    "elastic_group_norm",
    "elastic_hidden_features",
    "elastic_layer_norm",
    "elastic_linear",
    "elastic_linear_residual",
    "elastic_mlp",
    "elastic_mlp_half",
    "elastic_qkv",
    "packed_attention",
    "prototype_cross_entropy",
    "relative_position_bias",
    "render_crops",
    "shared_gradients",
    "sinkhorn_scaling",
    "window_attention",
    "working_weights",
]
