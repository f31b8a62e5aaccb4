"""A plain ViT of timm learns CIFAR-10's classes: `python -m helpers.supervised_vit IMAGES FILE 30`.

Thirty epochs on one CPU thread; `poa pretrain --init FILE head_dim=32` makes the weights elastic. IMAGES has
`train/` with class folders of images of 32 x 32 pixels.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from poa.data.crops import CropsConfig

BATCH, PEAK, DECAY = 128, 1e-3, 0.05


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 `[images, 3, 32, 32]` and labels, by class folder."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        [label for _, label in files]
    )


def augmented(images: Tensor) -> Tensor:
    """Shifted by up to 4 pixels, half of them mirrored."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    rows = torch.randint(9, (count, 1)) + torch.arange(32)
    columns = torch.randint(9, (count, 1)) + torch.arange(32)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip


def train(images: Tensor, labels: Tensor, epochs: int, out: Path) -> None:
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=int(labels.max()) + 1,
        drop_path_rate=0.05,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps, pct_start=0.1)
    for epoch in range(epochs):
        losses, started = [], time.process_time()
        for batch in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
            loss = F.cross_entropy(model(augmented(images[batch])), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        seconds = time.process_time() - started
        print(
            f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}, {seconds:.1f} CPU seconds", flush=True
        )
        torch.save(model.state_dict(), out)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels = read(Path(sys.argv[1]) / "train")
    mean, std = (torch.tensor(getattr(CropsConfig(), name)).view(3, 1, 1) for name in ("mean", "std"))
    train((pixels / 255 - mean) / std, labels, int(sys.argv[3]), Path(sys.argv[2]))
