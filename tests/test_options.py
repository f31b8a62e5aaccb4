"""Typed options: overrides, JSON, help."""

from __future__ import annotations

from typing import Any

import pytest

from poa.backbones import SwinConfig
from poa.config import PRESETS, Config, preset
from poa.errors import InputError
from poa.options import describe, first_difference, from_dict, override, to_dict


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("method.optim.base_lr=1", lambda c: (c.method.optim.base_lr, 1.0)),
        ("method.optim.base_lr=1e-3", lambda c: (c.method.optim.base_lr, 0.001)),
        ("method.batch_size=32", lambda c: (c.method.batch_size, 32)),
        ("method.crops.blur=0,0.1,0.2", lambda c: (c.method.crops.blur, (0.0, 0.1, 0.2))),
        ("method.crops.blur=[0, 0.1, 0.2]", lambda c: (c.method.crops.blur, (0.0, 0.1, 0.2))),
        ("method.head.prototypes=8", lambda c: (c.method.head.prototypes, (8,))),
        ("method.optim.epoch_steps=5", lambda c: (c.method.optim.epoch_steps, 5)),
        ("method.optim.epoch_steps=none", lambda c: (c.method.optim.epoch_steps, None)),
        ("performance.recompute=true", lambda c: (c.performance.recompute, True)),
        ("method.precision=fp16", lambda c: (c.method.precision, "fp16")),
        ("run.data=a=b", lambda c: (c.run.data, "a=b")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_override(assignment: str, read) -> None:
    value, expected = read(override(preset("quickstart"), [assignment]))
    assert value == expected
    assert type(value) is type(expected)


def test_another_kind_brings_its_defaults() -> None:
    changes = ["method.backbone.min_width=64", "method.backbone.kind=swin", "method.batch_size=8"]
    sizes = ["method.crops.global_size=32", "method.crops.local_size=32"]
    config = override(preset("quickstart"), [*changes, *sizes, "method.backbone.image_size=32"])
    assert config.method.backbone == SwinConfig(image_size=32, min_width=64)
    assert config.method.batch_size == 8
    assert override(config, ["method.backbone.kind=swin"]) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "method.optim.base_l=1",
            "unknown option 'method.optim.base_l'; did you mean 'method.optim.base_lr'",
        ),
        ("base_lr=1", "did you mean 'method.optim.base_lr'"),
        ("method=1", "unknown option 'method'"),
        ("method.batch_size=1.5", "method.batch_size: expected int, got 1.5"),
        ("method.batch_size=true", "method.batch_size: expected int, got True"),
        ("method.optim.base_lr=fast", "method.optim.base_lr: expected float, got 'fast'"),
        ("method.crops.blur=0,1", "method.crops.blur: expected float,float,float, got"),
        ("method.precision=fp8", r"method.precision: expected fp32\|bf16\|fp16, got 'fp8'"),
        ("method.batch_size", "expected an option KEY=VALUE, got 'method.batch_size'"),
        ("method.batch_size=0", "batch_size: expected at least 1, got 0"),
        ("method.crops.local_size=12", "multiple of the patch size 8, got 12"),
        ("method.backbone.image_size=32", "crops.global_size: expected backbone.image_size 32, got 24"),
        ("method.masks.ratio=0.6,0.5", "masks.ratio: expected 0 <= low <= high"),
        ("method.optim.warmup_epochs=1000", "optim.warmup_epochs: expected 0..75.0"),
    ],
)
def test_wrong_override(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(preset("quickstart"), [assignment])


def test_blur_must_fit_the_crops_it_is_used_on() -> None:
    even = ["method.crops.blur_kernel=4"]
    assert override(preset("quickstart"), even).method.crops.blur_kernel == 4
    with pytest.raises(InputError, match="blur_kernel: expected an odd number below 48, got 4"):
        override(preset("quickstart"), ["method.crops.blur=0,1,0", *even])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert from_dict(Config, to_dict(config)) == config


def test_every_option_is_explained() -> None:
    for key, kind, _, text in describe(Config()):
        assert text, key
        assert kind, key


def test_unknown_keys_in_a_file() -> None:
    values = to_dict(preset("quickstart"))
    values["method"]["optim"]["lrr"] = 1
    with pytest.raises(InputError, match="unknown option 'method.optim.lrr'"):
        from_dict(Config, values)


def test_first_difference() -> None:
    a = preset("quickstart")
    b = override(a, ["method.optim.clip=3", "method.optim.beta1=0.8"])
    assert first_difference(a, a) is None
    assert first_difference(a, b) == "method.optim.beta1: 0.9 against 0.8"


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="preset: expected one of quickstart"):
        preset("vit-xxl")


@pytest.mark.parametrize("values", [[], "text", 3, None])
def test_what_is_no_object_is_one_line(values: Any) -> None:
    with pytest.raises(InputError, match="options: expected an object of options, got"):
        from_dict(Config, values)
    with pytest.raises(InputError, match="method: expected an object of options, got"):
        from_dict(Config, {"method": values})
