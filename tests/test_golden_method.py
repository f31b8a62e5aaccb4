"""Heads, losses, the whole step and the optimiser against the official ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kernels import prototype_cross_entropy
from helpers import golden_cases as golden
from poa import losses
from poa.heads import HeadConfig, ProjectionHeads
from poa.losses import LossConfig
from poa.masks import Masks
from poa.network import Batch, Network, StudentPass
from poa.official import head_name, network_name
from poa.optim import OptimConfig, OptimizerKind, build_optimizer, clip_gradients, set_rates, update_weights
from poa.subnets import Subnet
from poa.tribranch import Centers, Targets, teacher_targets, tribranch_loss

OFFICIAL_PARTS = {"backbone": "backbone", "head": "dino_head"}


def _head_widths() -> list[int]:
    return sorted(int(key.removeprefix("x_w")) for key in golden.tensors("head", "inputs") if key[0] == "x")


@pytest.mark.parametrize("width", _head_widths())
def test_golden_head(width: int) -> None:
    case = golden.case("head")
    config = case["config"]
    model = ProjectionHeads(
        config["max_in_dim"],
        HeadConfig(
            prototypes=tuple(config["out_dims"]),
            hidden=config["hidden_dim"],
            bottleneck=config["bottleneck_dim"],
            layers=config["nlayers"],
        ),
    )
    model.load_state_dict({head_name(k): v for k, v in golden.tensors("head", "state").items()})
    inputs, outputs = golden.tensors("head", "inputs"), golden.tensors("head", "outputs")
    x = inputs[f"x_w{width}"].requires_grad_()
    logits = model(x)
    for i, out in enumerate(logits):
        golden.assert_close(out, outputs[f"w{width}.out{i}"])
    sum((out * inputs[f"loss_weight_w{width}.{i}"]).sum() for i, out in enumerate(logits)).backward()
    golden.assert_close(x.grad, outputs[f"w{width}.grad_x"], relative=2e-5, atol=2e-5)
    recorded = golden.ROOT / "head" / f"grads_w{width}.safetensors"
    if recorded.exists():
        parameters = dict(model.named_parameters())
        for name, grad in golden.tensors("head", recorded.stem).items():
            golden.assert_close(parameters[head_name(name)].grad, grad, relative=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def loss_case() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    return golden.case("loss"), golden.tensors("loss", "inputs"), golden.tensors("loss", "outputs")


def test_golden_loss_sinkhorn(loss_case: Any) -> None:
    case, inputs, outputs = loss_case
    heads = range(len(case["K"]))
    for kind in ("cls", "patch"):
        targets = losses.sinkhorn([inputs[f"teacher_{kind}1.{i}"] for i in heads], case["teacher_temp"])
        for i in heads:
            golden.assert_close(targets[i].dense(), outputs[f"sinkhorn_{kind}.{i}"])


@pytest.mark.parametrize("kind", ["cls", "patch"])
@pytest.mark.parametrize("equal_micro_batches", [False, True], ids=["exact", "official"])
def test_golden_loss_centering(loss_case: Any, kind: str, equal_micro_batches: bool) -> None:
    case, inputs, outputs = loss_case
    heads = range(len(case["K"]))
    centers = [torch.zeros(k) for k in case["K"]]
    for call in (1, 2):
        logits = [inputs[f"teacher_{kind}{call}.{i}"] for i in heads]
        targets = losses.centered(logits, centers, case["teacher_temp"])
        losses.update_centers(
            centers, logits, micro_batches=[len(logits[0])] if equal_micro_batches else None
        )
        for i in heads:
            got = targets[i].dense()
            expected = outputs[f"center_{kind}{call}.{i}"].reshape(got.shape)
            golden.assert_close(got, expected)
    for i in heads:
        expected = outputs[f"final_center_{kind}.{i}"].flatten()
        golden.assert_close(centers[i], expected)


def _loss_term(
    case: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor], name: str, x: Tensor
) -> Tensor:
    """One recorded loss, written with our pieces; logits are features of prototypes that are the axes."""
    kind, head = name.split(".")
    axes, rows = torch.eye(x.shape[1]), torch.arange(len(x))
    alone = torch.stack([rows, torch.full_like(rows, -1)], 1)

    def losses_of(targets: Tensor, index: Tensor, *students: Tensor) -> list[Tensor]:
        scale = torch.zeros(x.shape[1])
        temperatures = {"student_temperature": case["student_temp"], "teacher_temperature": 1.0}
        return prototype_cross_entropy(students, axes, targets.log(), scale, index, **temperatures)

    if kind == "dino_local":
        images = len(x) // case["n_local"]
        both = torch.arange(2 * images).view(2, images).t().repeat(case["n_local"], 1)
        (loss,) = losses_of(outputs[f"sinkhorn_cls.{head}"], both, x)
        return loss.unflatten(0, (case["n_local"], -1)).mean(1).sum()
    if kind == "dino_global":
        return losses_of(outputs[f"sinkhorn_cls.{head}"], alone, x)[0].mean()
    if kind == "distill_global":
        other = inputs[f"student_global_other.{head}"]
        return losses_of(outputs[f"vanilla.{head}"], alone, other, x)[2].mean()
    masks = Masks.from_mask(inputs["masks"])
    golden.assert_close(masks.weights, inputs["masks_weight"], relative=0)
    (loss,) = losses_of(outputs[f"sinkhorn_patch.{head}"], alone, x)
    return (loss * masks.weights).sum() / masks.mask.shape[0]


def test_golden_loss_terms(loss_case: Any) -> None:
    case, inputs, outputs = loss_case
    sources = {"dino_local": "local", "dino_global": "global", "distill_global": "global"}
    recorded = [name.removesuffix(".loss") for name in case["scalars"] if not name.startswith("koleo")]
    assert recorded
    for name in recorded:
        kind, head = name.split(".")
        x = inputs[f"student_{sources.get(kind, 'patch')}.{head}"].clone().requires_grad_()
        loss = _loss_term(case, inputs, outputs, name, x)
        loss.backward()
        golden.assert_close(loss, outputs[f"{name}.loss"])
        golden.assert_close(x.grad, outputs[f"{name}.grad"])


def test_golden_loss_koleo(loss_case: Any) -> None:
    case, inputs, outputs = loss_case
    names = [key for key in inputs if key.startswith("koleo")]
    assert names
    for name in names:
        x = inputs[name].clone().requires_grad_()
        loss = losses.koleo(x)
        loss.backward()
        golden.assert_close(loss, outputs[f"{name}.loss"])
        golden.assert_close(x.grad, outputs[f"{name}.grad"])


def _step_batch(ibot: bool) -> Batch:
    recorded = golden.tensors("step", "batch")
    mask = recorded["collated_masks"]
    masks = Masks.from_mask(mask if ibot else torch.zeros_like(mask))
    if ibot:
        assert torch.equal(masks.indices, recorded["mask_indices_list"])
        golden.assert_close(masks.weights, recorded["masks_weight"], relative=0)
    return Batch(recorded["collated_global_crops"], recorded["collated_local_crops"], masks)


def _step_config(targets: str) -> LossConfig:
    config = golden.case("step")["config"]
    return LossConfig(
        intact=config["dino"]["lambda_ie"],
        dino=config["dino"]["loss_weight"],
        ibot=config["ibot"]["loss_weight"],
        koleo=config["dino"]["koleo_loss_weight"],
        targets=targets,  # type: ignore[arg-type]
    )


def _run_step(student: Network, targets: Targets, batch: Batch, config: LossConfig) -> Any:
    space = student.backbone.space
    elastic = Subnet(*golden.case("step")["elastic"]["width_depth"])
    outputs = student(batch, [StudentPass(space.intact), StudentPass(elastic)])
    total, terms = tribranch_loss(*outputs, targets, batch, config)
    return outputs, total, terms


def _official_display(terms: dict[str, Tensor], config: LossConfig, local_views: int) -> dict[str, float]:
    """The sums our terms must add up to in the official `loss_dict` (which splits local and global)."""
    share = {"intact": config.intact, "elastic": 1 - config.intact}
    heads = sum(name.startswith("elastic.distill.") for name in terms)
    shown = {}
    for head in range(heads):
        for term in ("dino", "ibot"):
            shown[f"{term}.{head}"] = sum(share[s] * float(terms[f"{s}.{term}.{head}"]) for s in share)
        shown[f"distill.{head}"] = float(terms[f"elastic.distill.{head}"])
    return shown | {"koleo": config.koleo * float(terms["koleo"])}


def _recorded_display(recorded: dict[str, float]) -> dict[str, float]:
    shown: dict[str, float] = {}
    for name, value in recorded.items():
        if name == "koleo_loss":
            shown["koleo"] = 2 * value  # the official display halves it
            continue
        kind, head = name.split("_")[0], name.rsplit("_", 1)[-1]
        shown[f"{kind}.{head}"] = shown.get(f"{kind}.{head}", 0.0) + value * (2 if kind == "ibot" else 1)
    return shown


@pytest.mark.parametrize("run", ["ibot", "noibot"])
def test_golden_step(run: str) -> None:
    case = golden.case("step")
    student, teacher = golden.step_network("student"), golden.step_network("teacher")
    batch, config = _step_batch(case["results"][run]["activate_ibot"]), _step_config("sinkhorn")
    centers = Centers.zeros(teacher.head.config.prototypes, torch.device("cpu"))
    (targets,) = teacher_targets(teacher, [batch], case["teacher_temp"], config, centers)
    outputs, total, terms = _run_step(student, targets, batch, config)
    debug = golden.tensors("step", f"debug_{run}")
    for head, (cls, patches) in enumerate(zip(targets.cls, targets.patches, strict=True)):
        golden.assert_close(cls.dense(), debug[f"teacher_cls_target.{head}"], relative=5e-5)
        if batch.masks.mask.any():
            golden.assert_close(patches.dense(), debug[f"teacher_patch_target.{head}"], relative=5e-5)
        for name, output in zip(("intact", "elastic"), outputs, strict=True):
            logits = output.features[head] @ output.prototypes[head].t()
            golden.assert_close(logits, debug[f"{name}.head_out.{head}"][: len(logits)], relative=5e-5)
    results = case["results"][run]
    torch.testing.assert_close(total.item(), results["total_loss"], rtol=2e-5, atol=0)
    shown = _official_display(terms, config, batch.local_views)
    for name, value in _recorded_display(results["loss_dict"]).items():
        torch.testing.assert_close(shown[name], value, rtol=2e-5, atol=1e-7, msg=name)
    total.backward()
    _assert_step_gradients(student, run, set(results["grad_is_none"]))
    for name, norm in clip_gradients(student, 0.0).items():
        expected = results["grad_norm"][OFFICIAL_PARTS[name]]
        torch.testing.assert_close(float(norm), expected, rtol=2e-5, atol=0)


def _assert_step_gradients(student: Network, run: str, absent: set[str]) -> None:
    parameters = dict(student.named_parameters())
    for name, grad in golden.tensors("step", f"grads_{run}").items():
        got = parameters[network_name(name)].grad
        assert got is not None, name
        golden.assert_close(got, grad, relative=5e-5, atol=1e-6)
    # A mask token without masks gets a zero gradient here: under DDP every parameter must take part.
    for name in absent:
        grad = parameters[network_name(name)].grad
        assert grad is None or not grad.any(), name


def test_golden_step_centering() -> None:
    case = golden.case("step")
    student, teacher = golden.step_network("student"), golden.step_network("teacher")
    batch, config = _step_batch(ibot=True), _step_config("centering")
    centers = Centers.zeros(teacher.head.config.prototypes, torch.device("cpu"))
    for recorded in case["results"]["centering_two_calls"]:
        (targets,) = teacher_targets(teacher, [batch], case["teacher_temp"], config, centers)
        _, total, terms = _run_step(student, targets, batch, config)
        torch.testing.assert_close(total.item(), recorded["total_loss"], rtol=2e-5, atol=0)
        shown = _official_display(terms, config, batch.local_views)
        for name, value in _recorded_display(recorded["loss_dict"]).items():
            torch.testing.assert_close(shown[name], value, rtol=2e-5, atol=1e-7, msg=name)


OPTIMIZERS = pytest.mark.parametrize("kind", ["fused", "torch"])


def _optimise(
    steps: list[dict[str, Any]], kind: OptimizerKind, fill: bool = False
) -> list[dict[str, dict[str, Tensor]]]:
    """Run recorded gradients through clip, AdamW and EMA; `fill` gives absent gradients as zeros."""
    case = golden.case("step_optim")
    networks = {branch: golden.step_network(branch) for branch in ("student", "teacher")}
    student, teacher = networks.values()
    beta1, beta2 = case["adamw"]["betas"]
    assert case["adamw"]["eps"] == 1e-8
    rates = {"layer_decay": case["layerwise_decay"], "patch_embed_lr": case["patch_embed_lr_mult"]}
    optimizer = build_optimizer(student, teacher, OptimConfig(beta1=beta1, beta2=beta2, **rates), kind)
    states = []
    for step in steps:
        recorded = _gradients(step["grads"])
        for name, parameter in student.named_parameters():
            absent = torch.zeros_like(parameter) if fill else None
            parameter.grad = recorded[name].clone() if name in recorded else absent
        set_rates(optimizer, step["lr"], step["last_layer_lr"], step["wd"])
        norms, finite = update_weights(optimizer, student, teacher, case["clip_grad"], step["ema_m"])
        assert finite
        for name, norm in norms.items():
            expected = step["grad_norm_before_clip"][OFFICIAL_PARTS[name]]
            torch.testing.assert_close(float(norm), expected, rtol=2e-5, atol=0)
        states.append({b: {k: v.clone() for k, v in n.state_dict().items()} for b, n in networks.items()})
    return states


def _gradients(text: str) -> dict[str, Tensor]:
    """Gradients as the case names them: `[factor * ]../step/FILE.safetensors`."""
    factor, file = re.match(r"(?:([\d.]+) \* )?\.\./step/(\w+)\.safetensors", text).groups()
    scale = float(factor or 1)
    return {network_name(k): v * scale for k, v in golden.tensors("step", file).items()}


def _assert_state(state: dict[str, Tensor], recorded: dict[str, Tensor]) -> None:
    for name, value in recorded.items():
        ours = state[network_name(name)]
        golden.assert_close(ours, value, relative=2e-6)


def _optim_steps() -> list[dict[str, Any]]:
    case = golden.case("step_optim")
    return [case["step1"], case["step2"]]


@OPTIMIZERS
def test_golden_step_optim(kind: OptimizerKind) -> None:
    for number, state in enumerate(_optimise(_optim_steps(), kind), 1):
        for branch in ("student", "teacher"):
            _assert_state(state[branch], golden.tensors("step_optim", f"{branch}_after{number}"))


@OPTIMIZERS
def test_golden_step_optim_zero_gradients(kind: OptimizerKind) -> None:
    """Zero gradients for unused parameters, as the official FSDP run has them, still move them."""
    state = _optimise(_optim_steps(), kind, fill=True)[-1]
    for name, value in golden.tensors("step_optim", "fsdp_zero_grad_after2").items():
        branch, _, parameter = name.partition(".")
        _assert_state(state[branch], {parameter: value})


@OPTIMIZERS
def test_golden_step_optim_last_layer(kind: OptimizerKind) -> None:
    recorded = sorted((golden.ROOT / "step_optim").glob("lastlayer_lr*_after1.safetensors"))
    assert recorded
    for file in recorded:
        rate, branch = re.fullmatch(r"lastlayer_lr(.+)_(student|teacher)_after1", file.stem).groups()
        (state,) = _optimise([_optim_steps()[0] | {"last_layer_lr": float(rate)}], kind)
        _assert_state(state[branch], golden.tensors("step_optim", file.stem))
