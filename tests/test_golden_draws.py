"""Schedules, masks and the search space against the official ones."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import golden_cases as golden
from poa.backbones import ViTConfig
from poa.masks import draw_masks
from poa.optim import OptimConfig, Schedules, cosine_schedule
from poa.subnets import SubnetSampler, active_blocks


def _optim_config(official: dict[str, Any], stretch: float) -> OptimConfig:
    return replace(
        OptimConfig(),
        epochs=float(official["epochs"]),
        base_lr=official["base_lr"],
        min_lr=official["min_lr"],
        warmup_epochs=float(official["warmup_epochs"]),
        freeze_last_layer_epochs=float(official["freeze_last_layer_epochs"]),
        weight_decay=official["weight_decay"],
        weight_decay_end=official["weight_decay_end"],
        momentum=official["momentum_teacher"],
        momentum_end=official["final_momentum_teacher"],
        teacher_temperature=official["teacher_temp"],
        teacher_temperature_start=official["warmup_teacher_temp"],
        teacher_temperature_epochs=float(official["warmup_teacher_temp_epochs"]),
        stretch=stretch,
    )


def test_golden_schedules() -> None:
    case = golden.case("schedules")
    official, tolerance = case["config"], float(case["tolerance"])
    images = official["batch_size_per_gpu"] * official["world_size"]
    assert case["schedules"]
    for stretch, recorded in case["schedules"].items():
        config = _optim_config(official, float(stretch))
        built = Schedules.build(config, official["OFFICIAL_EPOCH_LENGTH"], images)
        ours = {
            "lr": built.lr,
            "wd": built.weight_decay,
            "momentum": built.momentum,
            "teacher_temp": built.teacher_temperature,
            "last_layer_lr": built.last_layer_lr,
        }
        compared = [name for name in ours if isinstance(recorded.get(name), list)]
        assert {"lr", "wd", "momentum", "teacher_temp"} <= set(compared)
        for name in compared:
            np.testing.assert_allclose(ours[name].values, recorded[name], rtol=0, atol=tolerance)
        for key, values in recorded.items():
            if key.startswith("value_at_"):
                for name, value in values.items():
                    assert ours[name][built.total_steps] == pytest.approx(value, abs=tolerance)


def test_golden_schedules_freeze() -> None:
    raw = golden.case("schedules")["raw"]
    words = raw["args"].split()
    args = dict(zip(words[::2], words[1::2], strict=True))
    schedule = cosine_schedule(
        float(args["base"]),
        float(args["final"]),
        int(args["total"]),
        warmup=int(args["warmup"]),
        start=float(args["start"]),
        freeze=int(args["freeze"]),
        stretch=float(args["scale"]),
    )
    np.testing.assert_allclose(schedule.values, raw["values"], rtol=0, atol=1e-12)


def _mask_settings() -> dict[str, tuple[float, float]]:
    """Mask ratios by model as the case states them: `vit (0.1,0.5), swin (0.1,0.3), ...`."""
    text = golden.case("masking")["semantics"]["how"]
    triples = re.findall(r"(\w+) \(([\d.]+),\s*([\d.]+)\)", text)
    return {name: (float(low), float(high)) for name, low, high in triples}


def test_golden_masking() -> None:
    case, recorded = golden.case("masking"), golden.tensors("masking", "outputs")
    ratios = _mask_settings()
    probability = float(re.search(r"mask_probability ([\d.]+)", case["semantics"]["how"])[1])
    assert case["cases"]
    for entry in case["cases"]:
        key = entry["key"]
        model, seed = re.fullmatch(r"([a-z]+)\d*\.seed(\d+)\.", key).groups()
        mask = recorded[f"{key}collated_masks"]
        side = round(mask.shape[1] ** 0.5)
        drawn = draw_masks(mask.shape[0], (side, side), probability, ratios[model], random.Random(int(seed)))
        assert torch.equal(drawn.mask, mask)
        assert torch.equal(drawn.indices, recorded[f"{key}mask_indices_list"])
        assert torch.equal(drawn.weights, recorded[f"{key}masks_weight"])
        assert drawn.mask.sum(1).tolist() == entry["per_image"]


def _search_space() -> tuple[dict[str, Any], ViTConfig]:
    case = golden.case("search_space")["vit_large"]
    config = case["config"]
    vit = ViTConfig(
        min_width=config["min_embed_dim"],
        max_width=config["max_embed_dim"],
        min_depth=config["min_depth"],
        max_depth=config["max_depth"],
        head_dim=config["head_dim"],
        sampling_scale=config["net_select_scale"],
    )
    return case, vit


def test_golden_search_space() -> None:
    case, vit = _search_space()
    space = vit.space
    assert list(space.widths) == case["widths"]
    assert list(space.depths) == case["depths"]
    assert len(space) == case["n_unique"]
    counts = [[s.width, s.depth, count] for s, count in space.multiplicities().items()]
    assert counts == case["networks_with_multiplicity"]
    assert sum(count for *_, count in counts) == case["num_networks"]
    assert [space.intact.width, space.intact.depth] == case["last"]
    for depth, blocks in case["block_idx"].items():
        assert active_blocks(vit.max_depth, int(depth)) == blocks


def test_golden_search_space_draws() -> None:
    """A round of draws is the recorded list without its last entry, shuffled."""
    case, vit = _search_space()
    sampler = SubnetSampler(vit.space, "per-rank", seed=0, micro_batches=1, cost=vit.flops)
    round_length = case["num_networks"] - 1
    drawn = Counter((s.width, s.depth) for s in (sampler.draw(i, 0) for i in range(round_length)))
    expected = Counter({(w, d): count for w, d, count in case["networks_with_multiplicity"]})
    expected[tuple(case["last"])] -= 1
    assert drawn == +expected
