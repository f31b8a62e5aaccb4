"""Folders of models in timm's layout: `config.json` and `model.safetensors`.

`timm.create_model("local-dir:FOLDER", pretrained=True)` reads them where timm has the architecture. Under
"poa", `config.json` also tells what timm does not ask: the shape as here, the pre-processing to the pixel,
where the weights come from, and their SHA-256, which is checked when they are loaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load as read_tensors
from torch import nn

from poa.backbones import CONFIGS, Backbone
from poa.checkpoint import Branch, RunFolder
from poa.classifier import Classifier
from poa.data.crops import CropsConfig
from poa.errors import InputError, as_input
from poa.export.model import CONFIG, FORMAT, HEAD, WEIGHTS, ExportedModel, static_model
from poa.files import open_regular, read_json, unsealed
from poa.options import section_from_dict
from poa.subnets import Subnet
from poa.weights import load_strictly

FORMER = "poa-model-1"  # a file of weights with a JSON file of the same name beside it


def extract(backbone: Backbone, subnet: Subnet, folder: Path, crops: CropsConfig, **options: Any) -> Path:
    """Write one subnet as a static model into a folder `{kind}-{subnet}` of `folder`, and return that.

    The other arguments are those of `static_model`, which raises the same errors.
    """
    model = static_model(backbone, subnet, crops, **options)
    config = model.config
    suffix = f"-{config.image_size}px" if config.image_size != backbone.config.image_size else ""
    return model.save(folder / f"{config.kind}-{subnet}{suffix}")


def load(
    path: str | Path,
    subnet: Subnet | str | None = None,
    *,
    branch: Branch = "teacher",
    step: int | None = None,
) -> ExportedModel:
    """Read a subnet as a model of its own, on the CPU, in evaluation mode.

    Args:
        path: a run folder, a folder of a model that `poa extract` or `save` wrote, or a folder of such
            folders; also a `.safetensors` file of former versions, with its `.json` beside it.
        subnet: which; needed where there are several. Default of a run: the intact network.
        branch: of a run: whose weights.
        step: of a run: that of the checkpoint; default the newest.

    Raises:
        InputError: nothing of these is there, a file was changed, or a subnet is not among them.

    Example:
        >>> import poa
        >>> model = poa.load("runs/first", "16x1")
        >>> model("photo.jpg").shape
        torch.Size([1, 16])
    """
    path, wanted = Path(path), Subnet.parse(subnet) if isinstance(subnet, str) else subnet
    if (path / CONFIG).exists() and not (path / WEIGHTS).exists():
        folder = RunFolder(path)
        network, checkpoint = folder.network(branch, step)
        config, backbone = folder.config(), network.backbone
        return static_model(
            backbone,
            wanted or backbone.space.intact,
            config.method.crops,
            canvas=config.method.canvas,
            bits=config.data.bits,
            source=f"{checkpoint.path} ({branch})",
            classifier=network if isinstance(network, Classifier) else None,
        )
    if step is not None or branch != "teacher":
        raise InputError(f"{path}: expected a run with a step or branch, got an extracted model or none")
    files = _weights(path)
    subnets = {file: _subnet(file) for file in files}
    chosen = [file for file in files if wanted in (None, subnets[file])]
    if len(chosen) != 1:
        which, names = wanted or "one subnet", ", ".join(map(str, subnets.values())) or "none"
        raise InputError(f"{path}: expected {which} of what lies there, got {len(chosen)} of: {names}")
    return _read_model(chosen[0])


def _weights(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path}: expected the folder of an extracted model or of a run, got nothing there")
    if not path.is_dir():
        return [path]
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    return sorted([*path.glob(f"*/{WEIGHTS}"), *path.glob("*.safetensors")])


def _subnet(weights: Path) -> Subnet:
    with as_input(f"{weights}: expected an extracted subnet"):
        info = _read_info(weights)
        depth = info["depth"]
        return Subnet(info["width"], tuple(depth) if isinstance(depth, list) else depth)


def _read_model(weights: Path) -> ExportedModel:
    with as_input(f"{weights}: expected an extracted subnet"):
        info = _read_info(weights)
        with open_regular(weights) as file:
            content = file.read()
        if (got := hashlib.sha256(content).hexdigest()) != info["sha256"]:
            raise InputError(
                f"{weights}: expected the weights of its JSON file (sha256 {info['sha256']:.8}), got others "
                f"({got:.8}); extract them again"
            )
        config = section_from_dict(CONFIGS, info["backbone"], "backbone")
        network, state, head = config.plain(), read_tensors(content), None
        if classes := info.get("classes"):
            described = config.timm_model()
            name = f"{described.classifier if described else HEAD}."
            own = {key.removeprefix(name): state.pop(key) for key in list(state) if key.startswith(name)}
            head = nn.Linear(own["weight"].shape[1], len(classes))
            load_strictly(head, own, str(weights))
        load_strictly(network, state, str(weights))
        return ExportedModel(network, config, info, head).eval()


def _read_info(weights: Path) -> dict[str, Any]:
    """What the JSON file beside weights says of them, as it was written."""
    whole = weights.name == WEIGHTS
    path = weights.with_name(CONFIG) if whole else weights.with_suffix(".json")
    content = read_json(path, f"{path}: expected the JSON file of an extracted subnet")
    info = content.get("poa") if whole and isinstance(content, dict) else content
    wanted = FORMAT if whole else FORMER
    if not isinstance(info, dict) or info.get("format") != wanted:
        got = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise InputError(f"{path}: expected format {wanted}, got {got}")
    if (intact := unsealed(content)) is None:
        raise InputError(f"{path}: expected what extract wrote, got a changed file; extract it again")
    kept: dict[str, Any] = intact["poa"] if whole else intact
    return kept
