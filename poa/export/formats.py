"""Models as files for other runtimes: ONNX, and `torch.export` programs.

A file takes any number of float32 images `[B, C, S, S]`, as `Preprocessing` makes them. It gives float32
features `[B, channels]` and, of a fine-tuned model, logits `[B, classes]`. It is read back and run before it
gets its name: what it computes must be the model's.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poa.errors import ExportError, optional_package
from poa.export.model import ExportedModel
from poa.files import writing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3}
"""Largest difference of a file's outputs from the model's, relative to the largest of these or 1."""

BATCHES = (1, 2, 5)  # images that a file is tried with
METADATA = "preprocessing"
"""The entry of an ONNX file's metadata, and the extra file of a program, for `Preprocessing.from_dict`. Of a
fine-tuned model there is also "classes", a JSON list of their names."""

Runner = Callable[[Tensor], tuple[Tensor, ...]]
"""From images to features, and to logits where there is a classifier."""


class _Served(nn.Module):
    """A network that computes in one dtype, and its classifier; float32 in and out."""

    def __init__(self, model: ExportedModel, dtype: torch.dtype):
        super().__init__()
        self.network, self.head = copy.deepcopy(model.backbone).to(dtype), copy.deepcopy(model.head)
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features: Tensor = self.network([images.to(self.dtype)])[0].cls.float()
        return (features,) if self.head is None else (features, self.head(features))


def require_packages(kind: str) -> None:
    """Raise InputError, before anything is written, where a package that a format needs is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        optional_package(name, "export")


def export_file(model: ExportedModel, folder: Path, kind: str, dtype: str = "fp32") -> Path:
    """Write a model as one file.

    Args:
        model: on the CPU, in evaluation mode.
        folder: exists.
        kind: "onnx" or "pt2" (`torch.export`, to be loaded by `torch.export.load`).
        dtype: of the computation, a key of `DTYPES`.

    Returns:
        The path: `model.onnx`, `model.fp16.onnx`, `model.pt2` or `model.fp16.pt2`.

    Raises:
        InputError: a package that the format needs is not installed.
        ExportError: the file does not compute what the model does.
        SaveError: the file system refused it.
    """
    make, run = {"onnx": (_onnx, onnx_runner), "pt2": (_program, _program_runner)}[kind]
    require_packages(kind)
    path = folder / f"model{'' if dtype == 'fp32' else f'.{dtype}'}.{kind}"
    served = _Served(model, DTYPES[dtype]).eval()
    with quiet(), torch.no_grad():
        content = make(served, model)
    write_checked(path, content, run, model, TOLERANCE[dtype])
    return path


def write_checked(
    path: Path, content: bytes, run: Callable[[Path], Runner], model: ExportedModel, tolerance: float
) -> None:
    """Write a file that gets its name where it computes what the model does; see `export_file`."""
    with writing(path) as file:
        file.write(content)
        file.flush()
        worst = largest_difference(model, run(Path(file.file.name)))
        if not worst < tolerance:  # also where it is NaN
            raise ExportError(
                f"{path}: expected outputs within {tolerance:g} of the model's, got a largest difference of "
                f"{worst:.2e}; the file was not written"
            )


@torch.no_grad()
def largest_difference(model: ExportedModel, run: Runner) -> float:
    """Of a file's outputs from the model's, on random images, relative to the largest of these or 1."""
    size, generator, worst = model.preprocess.size, torch.Generator().manual_seed(0), 0.0
    for count in BATCHES:
        images = torch.randn(count, model.preprocess.channels, size, size, generator=generator)
        features = model(images)
        outputs = (features,) if model.head is None else (features, model.head(features))
        for wanted, got in zip(outputs, run(images), strict=True):
            difference = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))
    return worst


def _example(model: ExportedModel) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Images, and the dimension of them that is free."""
    size = model.preprocess.size
    return (torch.zeros(2, model.preprocess.channels, size, size),), ({0: torch.export.Dim("batch", min=1)},)


def _metadata(model: ExportedModel) -> dict[str, str]:
    classes = {"classes": json.dumps(model.classes)} if model.classes else {}
    return {METADATA: json.dumps(model.preprocess.to_dict())} | classes


def _onnx(served: _Served, model: ExportedModel) -> bytes:
    images, sizes = _example(model)
    program = torch.onnx.export(
        served,
        images,
        dynamo=True,
        dynamic_shapes=sizes,
        input_names=["images"],
        output_names=["features", "logits"][: 1 if model.head is None else 2],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(model))
    content: bytes = program.model_proto.SerializeToString()
    return content


def onnx_runner(path: Path) -> Runner:
    """A file by onnxruntime on the CPU."""
    runtime = optional_package("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; fp16 warns of every product that it cannot fold
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def _program(served: _Served, model: ExportedModel) -> bytes:
    images, sizes = _example(model)
    program = torch.export.export(served, images, dynamic_shapes=sizes)
    torch.export.save(program, content := io.BytesIO(), extra_files=_metadata(model))
    return content.getvalue()


def _program_runner(path: Path) -> Runner:
    runner: Runner = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return runner


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of their own insides; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
