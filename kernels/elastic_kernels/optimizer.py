"""AdamW that also clips and keeps a moving average of the weights, in one pass.

    g *= min(1, max_norm / |g|)                    |g| over all tensors of a part of the network
    p, m, v = AdamW(p, g, m, v)
    a = momentum a + (1 - momentum) p              of the weights that have an average

Source: Loshchilov and Hutter, 2019, as `torch.optim.AdamW` computes it; moving average as in DINO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from elastic_kernels import dispatch
from elastic_kernels.dispatch import upload
from elastic_kernels.working_weights import working_weights

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.optimizer import Tables

OP = "FusedAdamW"


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with clipping and moving average in its step.

    Without any of them a step is that of `torch.optim.AdamW`, whose `state_dict` it reads and writes.

    Args:
        params, lr, betas, eps, weight_decay: as of `torch.optim.AdamW`; rates may change between steps.
        parts: parameters that are clipped by one norm, by name; every parameter in one part. Default: all in
            a part "all".
        averages: of parameters, of their shape, dtype and device; changed in place.

    Attributes:
        norms: norm of each part's gradients before clipping, after a step; on the device.
        finite: whether all of them are finite; bool, on the device.

    Raises:
        ValueError: parameters in no part or in two; averages of other shapes or devices.
        TypeError: averages of another dtype.
        RuntimeError: the Triton kernel was forced (see `backend`) and cannot run here: it takes contiguous
            float32 parameters.

    Numerics: everything is float32, what is the same for a whole tensor float64. A step with a gradient that
    is NaN or inf changes neither weights nor moments nor counts; averages move. Results repeat bitwise.
    Gradients are undefined after a step. With Triton nothing waits for the device.

    Example:
        >>> import torch
        >>> from elastic_kernels import FusedAdamW
        >>> layer, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
        >>> pairs = dict(zip(layer.parameters(), average.parameters()))
        >>> optimizer = FusedAdamW(layer.parameters(), averages=pairs)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step(max_norm=1.0, momentum=0.99)
        >>> optimizer.norms["all"].shape
        torch.Size([])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        parts: Mapping[str, Iterable[Tensor]] | None = None,
        averages: Mapping[Tensor, Tensor] | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)
        everything = [p for group in self.param_groups for p in group["params"]]
        self._parts = {"all": everything} if parts is None else {k: list(v) for k, v in parts.items()}
        self._averages = dict(averages or {})
        _validate(everything, self._parts, self._averages)
        self.norms: dict[str, Tensor] = {}
        self.finite = torch.ones((), dtype=torch.bool)
        self._plan: _Plan | None = None
        self._copies: working_weights | None = None

    @property
    def averages(self) -> Mapping[Tensor, Tensor]:
        """Of each parameter that has one."""
        return self._averages

    def set_averages(self, averages: Mapping[Tensor, Tensor]) -> None:
        """Move these averages, and no others, from the next step on; as of the constructor."""
        everything = [p for group in self.param_groups for p in group["params"]]
        _validate(everything, self._parts, averages)
        self._averages, self._plan = dict(averages), None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at construction: a later parameter would belong to no part."""
        if "_parts" in self.__dict__:
            raise RuntimeError(f"{OP}: expected all parameters at construction, got another group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of `torch.optim.AdamW`, however that runs."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update(foreach=None, fused=None, capturable=False)
        self._plan = None

    @contextmanager
    def writing(self, copies: working_weights) -> Iterator[None]:
        """While it lasts, steps write weights and averages rounded, too, and entering `copies` need not.

        It rounds those without LayerScale only where a step did not, or something changed them afterwards:
        another optimiser's step, or what PyTorch's version counters and addresses show, as `load_state_dict`
        and other `.data`. What they cannot show, as `weight.data.mul_(2)`, must not happen while this lasts.

        Args:
            copies: of parameters and averages, perhaps of some of them and of other tensors.
        """
        self._copies, self._plan = copies, None
        try:
            with register_optimizer_step_pre_hook(lambda *step: copies.forget()):
                yield
        finally:
            self._copies, self._plan = None, None
            copies.forget()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        momentum: float | None = None,
    ) -> Any:
        """Take a step.

        Args:
            closure: computes loss and gradients again; its result is returned.
            max_norm: clip the gradients of each part to it.
            momentum: of the averages; None leaves them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]["params"][0]
        if dispatch.choose(OP, first, _obstacle(self)).backend == "triton":
            self._triton_step(max_norm, momentum)
        else:
            self._reference_step(max_norm, momentum)
        return loss

    def _reference_step(self, max_norm: float | None, momentum: float | None) -> None:
        """The plain definition; on a GPU it waits for the device."""
        limit = float("inf") if max_norm is None else max_norm
        clip = torch.nn.utils.clip_grad_norm_
        self.norms = {name: clip(part, limit) for name, part in self._parts.items()}
        self.finite = torch.stack(list(self.norms.values())).isfinite().all()
        if self.finite:
            super().step()
        if momentum is not None and self._averages:
            torch._foreach_lerp_(list(self._averages.values()), list(self._averages), 1 - momentum)

    def _triton_step(self, max_norm: float | None, momentum: float | None) -> None:
        from elastic_kernels.triton_ops import optimizer as ops

        if self._plan is None or not self._plan.holds():
            self._plan = _Plan.build(self)
        plan = self._plan
        grads = [None if p.grad is None else _dense(p) for p in plan.params]
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        device = plan.params[0].device
        table = upload(torch.tensor(addresses), device)
        rates = upload(_rates(self.param_groups), device)
        aligned = plan.aligned and not any(a % 16 for a in addresses)
        squares = ops.squares(table, plan.tables, aligned)
        norms = torch.stack([s.sum(dtype=torch.float64) for s in squares.split(plan.chunks_of_parts)]).sqrt()
        norms = norms.float()
        clips = torch.ones_like(norms) if max_norm is None else (max_norm / (norms + 1e-6)).clamp(max=1.0)
        self.norms = dict(zip(self._parts, norms.unbind(), strict=True))
        self.finite = norms.isfinite().all()
        averaging = 1.0 if momentum is None else momentum
        torch.autograd.graph.increment_version(plan.holders)  # which the kernel finds by their addresses
        ops.update(table, plan.tables, rates, clips, self.finite, averaging, plan.bf16, aligned)
        if self._copies is not None:
            self._copies.note_written(plan.aliases)


def fused_adamw_backend(parameter: Tensor) -> dispatch.Choice:
    """The backend of a `FusedAdamW` of such parameters, and why."""
    return dispatch.choose(OP, parameter)


def _dense(parameter: Tensor) -> Tensor:
    """The gradient as the kernel reads it."""
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided or grad.dtype != torch.float32:
        raise TypeError(f"{OP}: expected dense float32 gradients, got {grad.layout} {grad.dtype}")
    if not grad.is_contiguous():
        parameter.grad = grad = grad.contiguous()
    return grad


def _rates(groups: Sequence[dict[str, Any]]) -> Tensor:
    """float64 `[5, groups]`: lr, weight decay, beta1, beta2, eps."""
    rows = [[g["lr"], g["weight_decay"], *g["betas"], g["eps"]] for g in groups]
    return torch.tensor(rows, dtype=torch.float64).t().contiguous()


def _obstacle(optimizer: FusedAdamW) -> str | None:
    """Why the kernel cannot take these parameters."""
    for group in optimizer.param_groups:
        if group["amsgrad"] or group["maximize"]:
            return "the kernel knows neither amsgrad nor maximize"
        for p in group["params"]:
            if p.dtype != torch.float32 or not p.is_contiguous():
                return f"the kernel takes contiguous float32 parameters, got {p.dtype}, strides {p.stride()}"
    return None


@dataclass(frozen=True)
class _Plan:
    """Where the tensors of an optimiser lie, part by part, and aliases of those that have a copy."""

    params: list[Tensor]
    addresses: list[int]
    tables: Tables
    chunks_of_parts: list[int]
    bf16: bool
    aligned: bool
    holders: list[Tensor]
    aliases: dict[Tensor, Tensor]

    def holds(self) -> bool:
        """Whether every tensor still lies there."""
        return self.addresses == [t.data_ptr() for t in self.holders]

    @classmethod
    def build(cls, optimizer: FusedAdamW) -> _Plan:
        from elastic_kernels.triton_ops import optimizer as ops

        params = [p for part in optimizer._parts.values() for p in part]
        device = params[0].device
        groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        states = [_state(optimizer, p) for p in params]
        steps = torch.stack([s["step"].to(device, torch.float32) for s in states])
        for state, step in zip(states, steps.unbind(), strict=True):
            state["step"] = step
        averages = optimizer._averages
        places = {} if optimizer._copies is None else optimizer._copies.places()
        copies = {t: place for t, place in places.items() if t.numel() % ops.COPIED.value == 0}
        sources = [*params, *averages.values()]
        columns: list[list[Tensor | None]] = [
            list(params),
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [averages.get(p) for p in params],
            [copies.get(p) for p in params],
            [copies.get(averages[p]) if p in averages else None for p in params],
        ]
        addresses = [[0 if t is None else t.data_ptr() for t in column] for column in columns]
        chunks = [-(-p.numel() // ops.CHUNK) for p in params]
        sizes = [len(part) for part in optimizer._parts.values()]
        part_of = [i for i, size in enumerate(sizes) for _ in range(size)]
        numbers = [[p.numel() for p in params], [groups[p] for p in params], part_of]
        pairs = [(i, n) for i, count in enumerate(chunks) for n in range(count)]
        holders = [t for column in columns for t in column if t is not None]
        return cls(
            params,
            [t.data_ptr() for t in holders],
            ops.Tables._make(
                [
                    *torch.tensor([*numbers, *addresses], device=device),
                    torch.tensor(pairs, dtype=torch.int32, device=device).reshape(-1, 2),
                    steps,
                ]
            ),
            [sum(c for c, part in zip(chunks, part_of, strict=True) if part == n) for n in range(len(sizes))],
            any(copy.dtype == torch.bfloat16 for copy in copies.values()),
            not any(a % 16 for column in addresses for a in column),
            holders,
            {t: t.detach() for t in sources if t in copies},
        )


def _state(optimizer: FusedAdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Of a parameter, as `torch.optim.AdamW` would begin it."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def _validate(
    params: Sequence[Tensor], parts: Mapping[str, Sequence[Tensor]], averages: Mapping[Tensor, Tensor]
) -> None:
    placed, known = [p for part in parts.values() for p in part], {*params}
    if len(placed) != len(params) or {*placed} != known:
        raise ValueError(
            f"{OP}: expected every one of {len(params)} parameters in one part, got {len(placed)} in "
            + ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        )
    if unknown := [t for t in averages if t not in known]:
        raise ValueError(f"{OP}: expected averages of its parameters, got one of {tuple(unknown[0].shape)}")
    for source, other in averages.items():
        if other.shape != source.shape or other.device != source.device or not other.is_contiguous():
            raise ValueError(
                f"{OP}: expected a contiguous average {tuple(source.shape)} on {source.device}, "
                f"got {tuple(other.shape)} on {other.device}"
            )
        if other.dtype != source.dtype:
            raise TypeError(f"{OP}: expected an average of {source.dtype}, got {other.dtype}")
