"""Models in 8 bits: ONNX files that onnxruntime quantises, with their accuracy beside that of fp32."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poa.config import Config
from poa.data.loader import evaluation_batches
from poa.data.sources import DataSplit
from poa.distributed import World
from poa.errors import InputError, optional_package
from poa.evaluate import REPORTED_K
from poa.evaluate.knn import KNN
from poa.evaluate.protocol import Function, Task
from poa.evaluate.sweep import score
from poa.evaluate.top1 import TOP1
from poa.export.formats import Runner, export_file, onnx_runner, quiet
from poa.export.model import ExportedModel
from poa.files import write_bytes

CALIBRATION = 256  # training images, spread over all, whose activations set the ranges
BATCH = 32


@dataclass(frozen=True)
class Quantised:
    """An int8 file.

    Attributes:
        path: of the file; its metadata holds both accuracies under "knn" or "top1".
        measure: what they are: 20-NN, or top-1 of a classifier.
        fp32, int8: accuracies of the held-out images, 0..1, both by onnxruntime.
    """

    path: Path
    measure: str
    fp32: float
    int8: float


def open_to_quantise(config: Config, image_size: int | None) -> DataSplit:
    """Training images, to calibrate with and as the bank of k-NN, and held-out ones; models are asked for
    `image_size`, None: that of training. Raises InputError: no labelled images are held out, or another
    size."""
    wanted = config.method.crops.global_size
    if image_size not in (None, wanted):
        raise InputError(f"--dtype int8: expected the image size of training {wanted}, got {image_size}")
    data = config.open()
    if data.test is None:
        raise InputError(f"--dtype int8: expected held-out images with labels, got none ({data.untested})")
    return data


def export_int8(model: ExportedModel, folder: Path, data: DataSplit, config: Config) -> Quantised:
    """Write a model whose weights and their inputs are 8-bit integers; norms, softmax and sums are fp32.

    Training images calibrate it and are the bank of k-NN, which scores models without a classifier. The file
    is `model.int8.onnx`. Raises InputError: no labelled images are held out, another image size than in
    training, or a package is missing.
    """
    onnx = optional_package("onnx", "export")
    with tempfile.TemporaryDirectory() as scratch:
        whole = export_file(model, Path(scratch), "onnx")
        small = Path(scratch) / "model.int8.onnx"
        with quiet():
            _quantise(whole, small, _calibration(model, data, config))
        protocol = KNN if model.head is None else TOP1
        tasks = [Task(protocol, _last_output(onnx_runner(file))) for file in (whole, small)]
        scores = score(tasks, data, config, World(0, 1, torch.device("cpu")))
        fp32, int8 = (protocol.headline(value) for value in scores)
        proto = onnx.load(small)
        entry = proto.metadata_props.add()
        known = {"k": REPORTED_K} if protocol is KNN else {}
        entry.key, entry.value = protocol.name, json.dumps(known | {"fp32": fp32, "int8": int8})
        path = folder / small.name
        write_bytes(path, proto.SerializeToString())
    return Quantised(path, f"{REPORTED_K}-NN" if protocol is KNN else protocol.reported, fp32, int8)


def _last_output(run: Runner) -> Function:
    """Features, or logits of a classifier."""
    return lambda images: run(images)[-1]


def _calibration(model: ExportedModel, data: DataSplit, config: Config) -> Iterator[dict[str, Any]]:
    """Batches of training images, as onnxruntime takes them."""
    count = len(data.train)
    chosen = np.unique(np.linspace(0, count - 1, min(count, CALIBRATION)).astype(np.int64))
    batches = evaluation_batches(data.train.subset(chosen), config.method.canvas, 0, batch_size=BATCH)
    for batch in batches:
        if len(batch.images):
            yield {"images": model.preprocess.crop(batch.images, batch.sizes).numpy()}


def _quantise(whole: Path, small: Path, batches: Iterator[dict[str, Any]]) -> None:
    quantization = optional_package("onnxruntime.quantization", "export")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    quantization.quantize_static(
        whole,
        small,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        extra_options={"MatMulConstBOnly": True},
    )
