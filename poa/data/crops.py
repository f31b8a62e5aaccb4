"""The options of crops and their augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from poa.options import Options, option


@dataclass(frozen=True)
class CropsConfig(Options, at="method.crops"):
    """Crops and augmentation; triples are for global view 1, global view 2 and local crops."""

    global_size: int = option(224, "pixels of a side of the two global crops", "[1, 4096]")
    local_size: int = option(96, "pixels of a side of the local crops", "[1, 4096]")
    local_count: int = option(8, "local crops of an image", "[0, 256]")
    global_scale: tuple[float, float] = option(
        (0.32, 1.0), "smallest and largest area of a global crop, relative to the image", "(0, 1]"
    )
    local_scale: tuple[float, float] = option(
        (0.05, 0.32), "smallest and largest area of a local crop, relative to the image", "(0, 1]"
    )
    aspect: tuple[float, float] = option((0.75, 4 / 3), "range of aspect ratios of crops", "[0.01, 100]")
    flip: float = option(0.5, "probability of a horizontal flip", "[0, 1]")
    rotation: float = option(0.0, "largest rotation in degrees, either way; 0: none", "[0, 180]")
    jitter: float = option(0.8, "probability of colour jitter", "[0, 1]")
    brightness: float = option(
        0.4, "colour jitter: brightness factors from 1 - value to 1 + value", "[0, 10]"
    )
    contrast: float = option(0.4, "colour jitter: contrast factors from 1 - value to 1 + value", "[0, 10]")
    saturation: float = option(
        0.2, "colour jitter of 3 channels: saturation factors from 1 - value to 1 + value", "[0, 10]"
    )
    hue: float = option(
        0.1, "colour jitter of 3 channels: largest hue shift, in turns of the colour circle", "[0, 0.5]"
    )
    grayscale: float = option(0.2, "probability of a grey-scale crop, of 3 channels", "[0, 1]")
    blur: tuple[float, float, float] = option(
        (0.0, 0.9, 0.5), "probability of Gaussian blur: first global crop, second, local crops", "[0, 1]"
    )
    blur_sigma: tuple[float, float] = option((0.1, 2.0), "range of the blur's sigma, pixels", "[0.001, 1000]")
    blur_kernel: int = option(9, "size of the blur kernel in pixels, an odd number", "[1, 255]")
    solarize: tuple[float, float, float] = option(
        (0.0, 0.2, 0.0), "probability of solarisation: first global crop, second, local crops", "[0, 1]"
    )
    eval_share: float = option(
        0.875, "centre crop of evaluation: its side over the shorter side of the image", "[0.1, 1]"
    )
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406), "mean of pixels by channel, in 0..1; poa data stats finds it", "[0, 1]"
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225), "standard deviation of pixels by channel", "[0.0001, 10]"
    )

    def eval_resize(self, size: int | None = None) -> int:
        """Pixels of the shorter side before the centre crop of `size` (default: `global_size`) pixels."""
        return round((size or self.global_size) / self.eval_share)

    def check(self) -> None:
        for name in ("global_scale", "local_scale", "aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise self.wrong(name, "the smaller value first")
        blurred = [self.global_size] * any(self.blur[:2]) + [self.local_size] * bool(
            self.blur[2] and self.local_count
        )
        if blurred and (self.blur_kernel % 2 == 0 or self.blur_kernel // 2 >= min(blurred)):
            raise self.wrong("blur_kernel", f"an odd number below {2 * min(blurred)}")
