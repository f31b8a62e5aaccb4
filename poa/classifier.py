"""A backbone with one linear classifier that all subnets share: each uses the columns of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic_kernels import ElasticLinear, shared_gradients
from poa.backbones import Backbone, BackboneConfig
from poa.network import StudentPass
from poa.subnets import Subnet


class Classifier(nn.Module):
    """What fine-tuning trains.

    `logits = w_max / w * cls W[:, :w]^T + b`, where `cls` are the `w` channels of a subnet's class token.

    Args:
        backbone: shape and search space.
        classes: names of the classes; the classifier begins at zero.

    Example:
        >>> import torch
        >>> from poa import Subnet, ViTConfig
        >>> from poa.classifier import Classifier
        >>> config = ViTConfig(image_size=32, min_width=64, max_width=128, min_depth=2, max_depth=4)
        >>> Classifier(config, ("cat", "dog")).logits(torch.randn(3, 3, 32, 32), Subnet(64, 3)).shape
        torch.Size([3, 2])
    """

    def __init__(self, backbone: BackboneConfig, classes: Sequence[str]):
        super().__init__()
        self.classes = tuple(classes)
        self.backbone: Backbone = backbone.build()
        self.head = ElasticLinear(backbone.feature_width(backbone.space.intact), len(self.classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, passes: Sequence[StudentPass]) -> list[Tensor]:
        """Logits `[B, classes]` of each pass; one call per step, so that DDP sees one forward."""
        with shared_gradients():
            return [self.head(self.backbone([images], p.subnet, drop=p.drop)[0].cls) for p in passes]

    def logits(self, images: Tensor, subnet: Subnet) -> Tensor:
        """float32 `[B, classes]` of normalised images `[B, C, S, S]`."""
        logits: Tensor = self.head(self.backbone([images], subnet)[0].cls)
        return logits.float()

    def plain_head(self, width: int) -> nn.Linear:
        """The classifier of so many channels as a layer of its own, float32, on the CPU."""
        layer = nn.Linear(width, len(self.classes))
        scale = self.head.in_features / width
        with torch.no_grad():
            layer.weight.copy_(scale * self.head.weight[:, :width])
            layer.bias.copy_(self.head.bias)
        return layer
