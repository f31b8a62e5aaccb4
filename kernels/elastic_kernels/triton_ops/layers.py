"""`autograd.Function`s of layers over the registered operators: what is saved, and the order of the backward.

    linear            x, and the sum before an activation
    linear residual   x; LayerScale's gradient comes out of the weight's
    mlp               x, and the sum before the activation, which is made again by the product that goes
                      back through it, unless it is kept (`kept_activations`)

They lie outside of the registered operators, which saves host time on each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import elastic_kernels.triton_ops.linear_dgrad
import elastic_kernels.triton_ops.linear_wgrad  # noqa: F401, each registers its operators
from elastic_kernels.shared_gradients import GradientLedger, earlier_gradients
from elastic_kernels.triton_ops.activations import ACTIVATION_BACKWARD
from elastic_kernels.triton_ops.device import unit_stride
from elastic_kernels.triton_ops.registration import first_order, ops
from elastic_kernels.triton_ops.vector_grads import VectorGrads
from elastic_kernels.working_weights import working_copy

NO_WEIGHT = torch.empty(0)


class LayerSpec(NamedTuple):
    """How a layer uses its weight.

    Attributes:
        groups: matrices stacked in the weight: 1, or 3 for q, k and v.
        out_features: rows of each in use.
        scale: the offset scale.
        dtype: of the product.
        ledger: of the networks that share the weight in this graph.
        key: of the weight, there.
        trains: backward may follow; else nothing is written that it alone would read.
        keeps: the activation of the sums is kept for backward, too.
    """

    groups: int
    out_features: int
    scale: float
    dtype: torch.dtype
    ledger: GradientLedger | None = None
    key: int = 0
    trains: bool = True
    keeps: bool = False


class Layer(NamedTuple):
    """The corners of a layer's parameters, and what their gradients need to know.

    Attributes:
        weight: as products read it, perhaps with gamma as a factor.
        bias, gamma: parameters.
        plain: the parameter that `weight` is made of, if it has gamma as a factor; else None.
        full: `[n_max, k_max]` of a group.
        grad_dtype: of the parameters.
        added: the bias that products add, until backward.
        parameters: whole weight, bias and gamma, where gradients may be added to theirs; else none.
    """

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    plain: Tensor | None
    full: list[int]
    grad_dtype: torch.dtype
    spec: LayerSpec
    added: Tensor | None = None
    parameters: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        width: int,
        spec: LayerSpec,
        *,
        alone: bool = False,
    ) -> Layer:
        """The corner of a weight `[groups * n_max, k_max]` for inputs `width` wide; rounded if it must be.

        Products that are `alone`, into which nothing but the bias is fused, take it rounded, where it is.
        """
        copy, groups, out = working_copy(weight, gamma, spec.dtype), spec.groups, spec.out_features
        accumulates = spec.ledger is not None and spec.ledger.accumulates
        parameters = (weight, bias, gamma) if accumulates else ()
        corner, plain, added = _stacked(copy.weight, groups)[:, :out, :width], None, None
        if alone and bias is not None:
            added = _stacked(working_copy(bias, None, spec.dtype).weight, groups)[:, :out]
        if bias is not None:
            bias = _stacked(bias, groups)[:, :out]
        if copy.gamma is not None:
            plain = _stacked(weight, groups)[:, :out, :width]
            added = None if copy.bias is None else copy.bias[None, :out]
        elif not alone:
            added = bias
        if gamma is not None:
            gamma = gamma[:out]
        full = [weight.shape[0] // groups, weight.shape[1]]
        return cls(corner.to(spec.dtype), bias, gamma, plain, full, weight.dtype, spec, added, parameters)

    @property
    def factor(self) -> Tensor | None:
        """What products multiply their columns with: gamma, where the weight has not."""
        return self.gamma if self.plain is None else None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd saves; `restore` takes it back."""
        return self.weight, self.bias, self.gamma, self.plain

    def restore(self, saved: Sequence[Tensor | None]) -> Layer:
        """This layer with tensors that autograd saved."""
        weight, bias, gamma, plain = saved
        assert weight is not None
        return self._replace(weight=weight, bias=bias, gamma=gamma, plain=plain)

    def without_tensors(self) -> Layer:
        """What a context may hold beside the saved tensors."""
        return self._replace(weight=NO_WEIGHT, bias=None, gamma=None, plain=None, added=None)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_fwd(x, self.weight, self.added, self.spec.scale)

    def forward_act(self, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Sums before the activation, and their activation."""
        return ops.linear_act_fwd(x, self.weight, self.added, self.spec.scale, kind, self.spec.trains)

    def forward_residual(
        self, x: Tensor, residual: Tensor, index: Tensor | None, row_scale: Tensor | None
    ) -> Tensor:
        return ops.linear_residual_fwd(
            x, self.weight, self.added, residual, self.factor, index, row_scale, self.spec.scale
        )

    def add_to(self, residual: Tensor, x: Tensor, index: Tensor | None, row_scale: Tensor | None) -> None:
        """`forward_residual` in place."""
        ops.linear_residual_(
            x, self.weight, self.added, residual, self.factor, index, row_scale, self.spec.scale
        )

    def dgrad(self, dy: Tensor) -> Tensor:
        return ops.linear_dgrad(dy, self.weight, self.factor, self.spec.scale)

    def kept(self, activation: Tensor) -> Tensor | None:
        """What backward keeps of `forward_act` beside the sums."""
        return activation if self.spec.keeps else None

    def dgrad_act(
        self, dy: Tensor, u: Tensor, kept: Tensor | None, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the sums `u`, their activation, made again if it was not kept, and `sums`."""
        arguments = (dy, self.weight, self.factor, u, self.spec.scale, kind, kept is None)
        du, activation, sums = ops.linear_dgrad_act(*arguments)
        return du, activation if kept is None else kept, sums

    def wgrad(
        self,
        dy: Tensor,
        x: Tensor,
        vectors: VectorGrads,
        sums: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of weight, bias and LayerScale, where there are such and they do not wait elsewhere.

        Complete once `vectors` are launched. `sums` are those of dy over parts of its rows, fp32
        `[parts, groups, n]`, if who made it summed them. The bias also has a gradient `[groups, n]` from
        elsewhere, if `addend` is given.
        """
        ledger, key = self.spec.ledger, self.spec.key
        whole = list(self.weight.shape[1:]) == self.full
        waiting = ledger.arrived(key) if ledger is not None and whole else None
        if self.bias is None:
            sums = None
        elif sums is None:
            sums = ops.linear_bias_sums(dy)
        if addend is not None and sums is not None:
            sums[0].add_(addend)
        if waiting is None and self.parameters and (earlier := earlier_gradients(self.parameters)):
            self._accumulate(dy, x, vectors, sums, *earlier)
            return None, None, None
        dweight, dbias, dgamma = self._gradients(dy, x, vectors, sums, *(waiting or (None, None, None)))
        if ledger is not None and ledger.awaits_whole(key):
            ledger.leave(key, dweight, dbias, dgamma)
            return None, None, None
        if self.gamma is not None and not (whole and dweight.dtype == self.grad_dtype):
            vectors.launch()  # what is copied here must be complete
        if not whole:
            _, out, width = self.weight.shape
            dweight = F.pad(dweight, (0, self.full[1] - width, 0, self.full[0] - out))
        return dweight.flatten(0, 1).to(self.grad_dtype), dbias, dgamma

    def _gradients(
        self,
        dy: Tensor,
        x: Tensor,
        vectors: VectorGrads,
        sums: Tensor | None,
        waiting: Tensor | None,
        dbias: Tensor | None,
        dgamma: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the corner of the weight and of the whole vectors, to each of which one that waits is added."""
        scale, dtype = self.spec.scale, self.grad_dtype
        if self.gamma is not None:
            p = ops.linear_wgrad(dy, x, scale, torch.float32)
            weight = self.weight if self.plain is None else self.plain
            layer = (weight, self.bias, self.gamma, waiting)
            return p, *vectors.scale(p, self.full[0], dtype, sums, *layer, dbias, dgamma)
        dbias = None if sums is None else vectors.add(sums, self.full[0], dtype, dbias)
        if waiting is not None and waiting.shape == self.weight.shape:
            ops.linear_wgrad_(waiting, dy, x, scale)
            return waiting, dbias, None
        p = ops.linear_wgrad(dy, x, scale, dtype if dtype == x.dtype else torch.float32)
        if waiting is not None:
            _, out, width = waiting.shape
            p[:, :out, :width].add_(waiting)
        return p, dbias, None

    def _accumulate(
        self,
        dy: Tensor,
        x: Tensor,
        vectors: VectorGrads,
        sums: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        dgamma: Tensor | None,
    ) -> None:
        """Add the gradients to those of the whole parameters, in place."""
        assert dweight is not None
        scale, (groups, out, width) = self.spec.scale, self.weight.shape
        corner = dweight.unflatten(0, (groups, -1))[:, :out, :width]
        if self.gamma is not None:
            p = ops.linear_wgrad(dy, x, scale, torch.float32)
            weight = self.weight if self.plain is None else self.plain
            assert dgamma is not None
            vectors.scale_into(corner, p, (dgamma, dbias), sums, weight, self.bias, self.gamma)
            return
        if sums is not None and dbias is not None:
            vectors.add_to(dbias, sums)
        if groups == 1 or out == self.full[0]:
            ops.linear_wgrad_(corner, dy, x, scale)
        else:  # which are not one matrix in memory
            corner.add_(
                ops.linear_wgrad(dy, x, scale, dy.dtype if corner.dtype == dy.dtype else torch.float32)
            )


def _stacked(x: Tensor, groups: int) -> Tensor:
    """`[groups * n, ...]` as `[groups, n, ...]`; `unflatten` takes microseconds of the host."""
    return x.unsqueeze(0) if groups == 1 else x.view(groups, -1, *x.shape[1:])


def keep(ctx: Any, tensors: Sequence[Tensor | None], layers: Sequence[Layer]) -> None:
    ctx.save_for_backward(*tensors, *(tensor for layer in layers for tensor in layer.tensors))
    ctx.layers = [layer.without_tensors() for layer in layers]


def kept(ctx: Any) -> tuple[list[Any], list[Layer]]:
    """What `keep` saved."""
    saved, count = list(ctx.saved_tensors), 4 * len(ctx.layers)
    tensors, rest = saved[: len(saved) - count], saved[len(saved) - count :]
    return tensors, [layer.restore(rest[4 * i : 4 * i + 4]) for i, layer in enumerate(ctx.layers)]


def branch_gradient(
    dout: Tensor, index: Tensor | None, row_scale: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the rows of the branch that ends in a layer, and sums of it for the layer's bias.

    It is the given one if nothing changes it, and then nobody has summed it.
    """
    dtype = layer.weight.dtype
    if index is None and row_scale is None and dout.dtype == dtype:
        return unit_stride(dout), None
    return ops.branch_grad(dout, index, row_scale, dtype, layer.bias is not None)


class LinearFunction(torch.autograd.Function):
    """A product with a corner, its bias, and perhaps an activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec, activation: str | None
    ) -> Tensor:
        x = unit_stride(x.to(spec.dtype))
        layer = Layer.of(weight, bias, None, x.shape[1], spec, alone=activation is None)
        u, y = layer.forward_act(x, activation) if activation else (None, layer.forward(x))
        keep(ctx, (x, u), [layer])
        ctx.activation = activation
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, u), (layer,) = kept(ctx)
        dy = unit_stride(dy if u is None else ACTIVATION_BACKWARD[ctx.activation](dy, u))
        dx = layer.dgrad(dy) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, None, None
        vectors = VectorGrads()
        dweight, dbias, _ = layer.wgrad(dy, x, vectors)
        vectors.launch()
        return dx, dweight, dbias, None, None


class LinearResidualFunction(torch.autograd.Function):
    """A product with a corner, LayerScale, and the residual addition to chosen rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gamma: Tensor | None,
        index: Tensor | None,
        row_scale: Tensor | None,
        spec: LayerSpec,
    ) -> Tensor:
        x = unit_stride(x.to(spec.dtype))
        layer = Layer.of(weight, bias, gamma, x.shape[1], spec)
        keep(ctx, (x, index, row_scale), [layer])
        return layer.forward_residual(x, unit_stride(residual), index, row_scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x, index, row_scale), (layer,) = kept(ctx)
        d, sums = branch_gradient(dout, index, row_scale, layer)
        vectors = VectorGrads()
        dweight, dbias, dgamma = layer.wgrad(d, x, vectors, sums)
        vectors.launch()
        return layer.dgrad(d), dweight, dbias, dout, dgamma, None, None, None


def mlp_backward(
    d: Tensor,
    sums: Tensor | None,
    x: Tensor,
    u: Tensor,
    activation: Tensor | None,
    fc1: Layer,
    fc2: Layer,
    vectors: VectorGrads,
    kind: str = "gelu",
) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The gradient of the MLP's input and those of all parameters; `d` and `sums` as `branch_gradient`."""
    du, activation, du_sums = fc2.dgrad_act(d, u, activation, kind)
    second = fc2.wgrad(d, activation, vectors, sums)
    del activation
    return fc1.dgrad(du), fc1.wgrad(du, x, vectors, du_sums), second


class MlpFunction(torch.autograd.Function):
    """Both layers of an MLP around an activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        specs: tuple[LayerSpec, LayerSpec],
        activation: str,
    ) -> Tensor:
        x = unit_stride(x.to(specs[0].dtype))
        fc1 = Layer.of(fc1_weight, fc1_bias, None, x.shape[1], specs[0])
        fc2 = Layer.of(fc2_weight, fc2_bias, None, specs[0].out_features, specs[1], alone=True)
        u, h = fc1.forward_act(x, activation)
        keep(ctx, (x, u, fc1.kept(h)), [fc1, fc2])
        ctx.activation = activation
        return fc2.forward(h)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x, u, activation), (fc1, fc2) = kept(ctx)
        d, sums = branch_gradient(dout, None, None, fc2)
        vectors = VectorGrads()
        layers = fc1, fc2, vectors, ctx.activation
        dx, (dw1, db1, _), (dw2, db2, _) = mlp_backward(d, sums, x, u, activation, *layers)
        vectors.launch()
        return dx, dw1, db1, dw2, db2, None, None
