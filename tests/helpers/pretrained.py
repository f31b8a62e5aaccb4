"""Networks that stand for pretrained ones, and whether two compute the same."""

from __future__ import annotations

from typing import Any

import torch

from poa.backbones import Backbone


def random_weights(network: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def same_features(a: Backbone, b: Backbone) -> None:
    images = torch.randn(2, 3, a.config.image_size, a.config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(a([images])[0].patches, b([images])[0].patches, rtol=0, atol=1e-5)
