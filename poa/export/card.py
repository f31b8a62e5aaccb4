"""Model cards: the README.md of a model's folder, and its way to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from poa.checkpoint import RunFolder
from poa.errors import InputError, as_input, one_line, optional_package
from poa.evaluate import accuracies, number_format
from poa.export.model import CONFIG, MADE_OF_WEIGHTS, WEIGHTS, ExportedModel
from poa.files import read_json, write_text
from poa.report import evaluations
from poa.version import VERSION

CARD = "README.md"
PUSHED = (CARD, CONFIG, WEIGHTS, *MADE_OF_WEIGHTS)

TIMM = """
In [timm](https://github.com/huggingface/pytorch-image-models), where `FOLDER` is this folder:

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)  # from the Hub: "hf-hub:USER/NAME"
```
"""
USE = """
With the pre-processing of the evaluation, from a file to its feature:

```python
import poa

model = poa.load("FOLDER")
feature = model("photo.jpg")
```
"""
CLASSIFY = """
```python
logits = model.classify("photo.jpg")  # of model.classes
```
"""


def write_card(model: ExportedModel, folder: Path, run: RunFolder, weights: str, licence: str) -> Path:
    """Write the card of a model into its folder, out of the data and settings of its run and the evaluations
    of its weights.

    `weights` are `BRANCH of step N`, `licence` is an identifier of the Hub such as apache-2.0.
    """
    path = folder / CARD
    write_text(path, "\n".join(_card(model, folder.name, run, weights, licence)))
    return path


def _card(model: ExportedModel, name: str, run: RunFolder, weights: str, licence: str) -> Iterator[str]:
    config, pixels, subnet = run.config(), model.preprocess, model.subnet
    method = config.method
    task = "image-classification" if model.classes else "image-feature-extraction"
    yield f"---\nlibrary_name: timm\nlicense: {json.dumps(licence)}\npipeline_tag: {task}"
    yield f"tags:\n- {task}\n- self-supervised\n- timm\n- poa\n---\n"
    yield f"# {name}\n"
    use = f"to tell {len(model.classes)} classes of images apart" if model.classes else "for image features"
    yield f"A {model.config.kind} {use}, one of {len(method.backbone.space)} networks of one"
    tuned = ", fine-tuned" if model.classes else ""
    yield f"self-supervised pre-training run ([POA](https://arxiv.org/abs/2408.01031)){tuned}.\n"
    facts = {
        "network": f"{subnet}, {model.info['params']:,} parameters",
        "GFLOPs": f"{model.config.flops(subnet) / 1e9:.3g} an image",
        "features": f"{model.config.feature_width(subnet)} channels",
        "images": f"{pixels.size} pixels, the centre of {pixels.resize}; mean {list(pixels.mean)}, "
        f"standard deviation {list(pixels.std)}; bicubic",
        "trained on": Path(config.data.source).name,
        "training": f"{method.optim.epochs:g} epochs of {method.batch_size} images a step and rank, "
        f"seed {method.seed}",
        **({"fine-tuning": _fine_tuning(run), "classes": ", ".join(model.classes)} if model.classes else {}),
        "weights": Path(model.info["source"]).name,
        "written by": f"poa {VERSION}",
    }
    yield from _table(("", ""), facts.items())
    yield "\n## Accuracy\n"
    scores = evaluations(run, accuracies).items()
    rows = [
        (_without_place(about), format(row[str(subnet)], number_format(about.rpartition(": ")[2])))
        for about, row in scores
        if str(subnet) in row and about.startswith(f"{weights}, ")
    ]
    yield from _table(("of held-out images", "accuracy"), rows) if rows else ["Not evaluated."]
    yield "\n## How to use it"
    yield (TIMM if model.config.timm_model() else "") + USE + (CLASSIFY if model.classes else "")
    yield "## Licence\n"
    yield f"{licence}\n" if licence != "other" else "Not stated.\n"


def _fine_tuning(run: RunFolder) -> str:
    wanted = f"{run.finetuning}: expected the options of fine-tuning"
    with as_input(wanted):
        options = read_json(run.finetuning, wanted)
        return (
            f"{options['epochs']:g} epochs of {options['batch_size']} images a step and rank, "
            f"{options['share']:.0%} of the labels"
        )


def _without_place(about: str) -> str:
    """`BRANCH of step N, DATA: SCORE` without the folders above the data."""
    weights, _, data = about.partition(", ")
    return f"{weights}, {Path(data).name}"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for left, right in [head, ("---", "---"), *rows]:
        yield f"| {left} | {right} |"


def push(folder: Path, name: str, *, dry_run: bool) -> str:
    """Upload a model's folder to a repository `USER/NAME` of the Hugging Face Hub, private if there is none
    yet, and say in a line what was done, or would be. Raises InputError: huggingface_hub is not installed, or
    the Hub refused it."""
    files = sorted(file for pattern in PUSHED for file in folder.glob(pattern))
    size = sum(file.stat().st_size for file in files) / 2**20
    what = f"{', '.join(file.name for file in files)} ({size:.1f} MiB)"
    if dry_run:
        return f"would push to {name}: {what}"
    hub = optional_package("huggingface_hub", "timm")
    try:
        api = hub.HfApi()
        place = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, allow_patterns=[file.name for file in files])
    except Exception as error:  # of the network, of the account, of the name
        raise InputError(f"--push {name}: expected a writable repository, got {one_line(error)}") from error
    return f"pushed to {place}: {what}"
