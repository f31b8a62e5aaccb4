"""Typed options: overrides, JSON, help."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import Any

import pytest

from poa.backbones import ResNetConfig, SwinConfig
from poa.config import Config
from poa.errors import InputError
from poa.optim import Schedules
from poa.options import Interval, describe, first_difference, from_dict, nearest, override, to_dict
from poa.presets import preset


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("method.optim.base_lr=1", lambda c: (c.method.optim.base_lr, 1.0)),
        ("base_lr=.1", lambda c: (c.method.optim.base_lr, 0.1)),
        ("crops.blur=0.,.1,1.e-1", lambda c: (c.method.crops.blur, (0.0, 0.1, 0.1))),
        ("base_lr=1e-3", lambda c: (c.method.optim.base_lr, 0.001)),
        ("method.batch_size=32", lambda c: (c.method.batch_size, 32)),
        ("method.crops.blur=0,0.1,0.2", lambda c: (c.method.crops.blur, (0.0, 0.1, 0.2))),
        ("crops.blur=[0, 0.1, 0.2]", lambda c: (c.method.crops.blur, (0.0, 0.1, 0.2))),
        ("method.head.prototypes=8", lambda c: (c.method.head.prototypes, (8,))),
        ("method.optim.epoch_steps=5", lambda c: (c.method.optim.epoch_steps, 5)),
        ("method.optim.epoch_steps=none", lambda c: (c.method.optim.epoch_steps, None)),
        ("performance.recompute=true", lambda c: (c.performance.recompute, True)),
        ("method.precision=fp16", lambda c: (c.method.precision, "fp16")),
        ("method.optim.lr_scaling=none", lambda c: (c.method.optim.lr_scaling, "none")),
        ("data.source=a=b", lambda c: (c.data.source, "a=b")),
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
    assert nearest("workers", ["erasing", "warmup_epochs", "batch_size"]) is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "method.optim.base_l=1",
            "unknown option 'method.optim.base_l'; did you mean 'method.optim.base_lr'",
        ),
        ("method=1", "unknown option 'method'"),
        ("method.batch_size=1.5", "method.batch_size: expected int, got 1.5"),
        ("method.batch_size=true", "method.batch_size: expected int, got True"),
        ("method.optim.base_lr=fast", "method.optim.base_lr: expected float, got 'fast'"),
        ("method.crops.blur=0,1", "method.crops.blur: expected float,float,float, got"),
        ("method.precision=fp8", r"method.precision: expected fp32\|bf16\|fp16, got 'fp8'"),
        ("method.batch_size", "expected an option KEY=VALUE, got 'method.batch_size'"),
        ("method.batch_size=0", r"method.batch_size: expected a value in \[1, 65536\], got 0$"),
        ("method.crops.local_size=12", "multiple of the patch size 8, got 12"),
        (
            "method.backbone.image_size=32",
            "method.crops.global_size: expected method.backbone.image_size 32, got 24",
        ),
        ("method.masks.ratio=0.6,0.5", "method.masks.ratio: expected the smaller value first, got"),
        ("method.optim.base_lr=NaN", r"method.optim.base_lr: expected a value in \(0, 100\], got nan"),
        ("method.crops.std=0,1,1", r"method.crops.std: expected values in \[0.0001, 10\], got \(0.0"),
        ("method.optim.epochs=1e300", r"method.optim.epochs: expected a value in \(0, 1e6\], got 1e\+300"),
        ("method.seed=" + "9" * 5000, r"method.seed: expected int, got '9{59}... \(5,002 characters\)"),
        ("method.seed=" + "[" * 60_000, "method.seed: expected int, got "),
        ("method.head.hidden=65536", "method: expected at most 10,000,000,000 parameters, got 17,2"),
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


def test_every_option_is_explained() -> None:
    for key, kind, _, text in describe(Config()):
        assert text, key
        assert kind, key


@pytest.mark.parametrize("options", [Config(), SwinConfig(), ResNetConfig()], ids=lambda o: type(o).__name__)
def test_every_number_has_bounds(options: Any) -> None:
    for key, kind, value, _ in describe(options):
        numbers = value if isinstance(value, tuple) else (value,)
        if "int" in kind or "float" in kind:
            assert " in " in kind, key
        else:
            assert not any(type(number) in (int, float) for number in numbers), key


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "-1", "0", "1e30", "1" + "0" * 30, "1e-30"]
)
@pytest.mark.parametrize("name", ["quickstart", "quickstart-swin", "quickstart-resnet"])
def test_absurd_numbers_are_refused_or_harmless(name: str, value: str) -> None:
    """Every option by its full name in the message; what is taken is within the bounds."""
    config = preset(name)
    for key, kind, old, _ in describe(config):
        if " in " not in kind:
            continue
        text = ",".join([value] * len(old)) if isinstance(old, tuple) else value
        try:
            changed = override(config, [f"{key}={text}"])
        except InputError as error:
            assert str(error).startswith(key.rpartition(".")[0].split(".")[0]), str(error)
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        got = next(v for k, _, v, _ in describe(changed) if k == key)
        interval = Interval.parse(kind.partition(" in ")[2])
        assert got is None or all(n in interval for n in (got if isinstance(got, tuple) else (got,))), key


@pytest.mark.parametrize("epochs", [0.5, 1, 20, 30])
def test_durations_that_do_not_fit_are_refused_with_some_that_do(epochs: float) -> None:
    """The published recipe for a shorter run; the message can be copied."""
    short = f"method.optim.epochs={epochs}"
    with pytest.raises(InputError, match="expected every phase to end before epochs") as caught:
        override(preset("vit-s16"), [short])
    fitting = str(caught.value).partition("these would fit: ")[2].split()
    optim = override(preset("vit-s16"), [short, *fitting]).method.optim
    assert optim.ibot_start_epoch == optim.teacher_temperature_epochs == pytest.approx(epochs / 10)
    assert optim.warmup_epochs == pytest.approx(epochs / 30, rel=1e-2)
    schedules = Schedules.build(optim, 1000, 1024)
    assert (schedules.last_layer_lr.values > 0).any() and schedules.ibot_start < schedules.total_steps


def test_masks_need_not_begin_without_their_loss() -> None:
    never = ["method.optim.ibot_start_epoch=100", "method.loss.ibot=0"]
    assert override(preset("quickstart"), never).method.optim.ibot_start_epoch == 100


def test_more_subnets_than_anybody_lists() -> None:
    with pytest.raises(InputError, match="method.backbone: expected at most 100,000 subnets, got 3"):
        SwinConfig(max_depths=(99, 99, 99, 9))


def test_more_steps_than_anybody_takes() -> None:
    optim = override(preset("quickstart"), ["method.optim.epochs=1e6"]).method.optim
    with pytest.raises(
        InputError, match="method.optim.epochs: expected at most 10,000,000 steps, got 1e.06 ep"
    ):
        Schedules.build(optim, 21, 64)


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


@pytest.mark.parametrize("values", [[], "text", 3, None])
def test_what_is_no_object_is_one_line(values: Any) -> None:
    with pytest.raises(InputError, match="options: expected an object of options, got"):
        from_dict(Config, values)
    with pytest.raises(InputError, match="method: expected an object of options, got"):
        from_dict(Config, {"method": values})


def test_configurations_of_before_are_read_under_the_names_of_now() -> None:
    values = to_dict(preset("quickstart"))
    old = {
        "run": {"data": "images", "holdout": 0.5},
        "method": {"chunks": 8},
        "performance": {"reduce": "bf16"},
    }
    del values["data"], values["method"]["micro_batches"], values["method"]["reduce_dtype"]
    for section, options in old.items():
        values[section] |= options
    kept = json.dumps(values)
    config = from_dict(Config, values)
    assert (config.data.source, config.data.holdout) == ("images", 0.5)
    assert (config.method.micro_batches, config.method.reduce_dtype) == (8, "bf16")
    assert json.dumps(values) == kept
    assert override(config, ["run.holdout=0"]).data.holdout == 0


def test_every_former_name_leads_to_an_option() -> None:
    known = {key for key, *_ in describe(preset("quickstart"))}
    assert set(Config.RENAMED.values()) <= known and not known & set(Config.RENAMED)


def test_absurd_options_of_a_run_end_in_a_line_or_train() -> None:
    """Every 197th of all options with all absurd values; `helpers.sweep_options` tries all."""
    command = [sys.executable, "-m", "helpers.sweep_options", "197"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert sum(ast.literal_eval(done.stdout.splitlines()[-1]).values()) > 12
