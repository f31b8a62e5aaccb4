"""The command line: every command on a tiny run, and wrong input in one line without traces."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import poa
from helpers.commands import contents, fails
from helpers.tiny import OVERRIDES
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.cli.parser import _parser
from poa.options import describe
from poa.presets import preset

Run = Path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two class folders of small pictures of different sizes."""
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def pretrain(out: Path, *arguments: str) -> list[str]:
    return ["pretrain", "--out", str(out), *OVERRIDES, *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "got 'nowhere': no such folder"),
        (["--data", "EMPTY"], "expected images"),
        (["method.optim.base_l=1"], "did you mean 'method.optim.base_lr'"),
        (["method.batch_size=many"], "expected int, got 'many'"),
        (["method.crops.local_size=12"], "multiple of the patch size 8, got 12"),
        (["method.backbone.max_width=40"], "max_width: expected a multiple of head_dim 16, got 40"),
        (["--device", "nonsense"], "expected auto, cpu, cuda or cuda:N, got 'nonsense'"),
        (["--preset", "vit-xxl"], "preset: expected one of"),
        (["--config", "nowhere.json"], "config: expected a JSON file"),
        (
            ["--flag"],
            "unrecognized argument --flag; options of a run are written KEY=VALUE, without dashes: ",
        ),
        (["--method.batch_size", "4"], "without dashes: did you mean method.batch_size=4? (see poa pretrain"),
        (["--batch-size=4"], "did you mean method.batch_size=4?"),
        (["vit-s16"], "unrecognized argument vit-s16; did you mean --preset vit-s16?"),
        (["--lr", "1e-3"], "did you mean method.optim.base_lr=1e-3?"),
        (["--presets", "vit-s16"], "unrecognized argument --presets; did you mean --preset?"),
        (["method.batchsize=4"], "unknown option 'method.batchsize'; did you mean 'method.batch_size'?"),
        (["run.knn_subnets=16x1,99x9", "--check"], "subnet 99x9: expected a width of 16, 32"),
        (["performance.optimizer=apex", "--check"], "expected NVIDIA's apex for 'apex', but it does not"),
        (["--data", ""], "poa: error: argument --data: expected a value, got ''"),
        (["data.source="], "data.source: expected digits, or where the images are, got ''"),
        (
            ["--resume", "somewhere"],
            "--resume: expected no --preset, --config, --init, --teacher, --out or --auto-resume",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_pretrain(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    arguments = [a.replace("EMPTY", str(tmp_path / "empty")) for a in arguments]
    device = [] if "--device" in arguments else ["run.device=cpu"]
    assert message in fails(
        capsys, "pretrain", "--out", str(tmp_path / "out"), *OVERRIDES[:-1], *device, *arguments
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Run) -> None:
    arguments = ["pretrain", "--out", str(tmp_path / "out"), "--device", "cuda", *OVERRIDES[:-1]]
    assert "expected a CUDA device" in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()
    assert "expected a CUDA device" in fails(capsys, "evaluate", str(trained), "--device", "cuda")


SUBNETS = [
    (",", "--subnets: expected subnets such as 16x1, or all, got ','"),
    ("48x2", "subnet 48x2: expected a width of 16, 32"),
    ("32x9", "and a depth of 1, 2"),
    ("small", "expected WIDTHxDEPTH such as 384x12 or 64x3-4-6-3, got 'small'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (f"{command} RUN --subnets {names}", line)
            for command in ("extract", "evaluate")
            for names, line in SUBNETS
        ),
        ("extract RUN --subnets 16x1 --image-size 20", "multiple of the patch size 8, got 20"),
        ("pretrain --resume RUN method.loss.koleo=9", "method.loss.koleo: 9.0 against 0.1 in the checkpoint"),
        (" ".join(pretrain(Path("RUN"))), "resume it with --resume RUN"),
    ],
)
def test_refusals_leave_a_run_as_it_is(
    arguments: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    words = arguments.replace("RUN", str(run)).split()
    assert message.replace("RUN", str(run)) in fails(capsys, *words)
    assert contents(run) == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again(run: Run) -> None:
    expected = contents(run)
    shutil.rmtree(run / "checkpoints")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')
    assert main(pretrain(run)) == 0
    again = contents(run)
    assert again.keys() == expected.keys()
    assert again[str(run / "config.json")] == expected[str(run / "config.json")]
    assert again[str(run / "metrics.jsonl")].count(b"\n") == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_become_unreadable(
    workers: int,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("poa.images.require_readable", lambda *_: None)
    for picture in images.glob("*/*.png"):
        picture.write_bytes(b"not an image")
    arguments = pretrain(tmp_path / "out", "--data", str(images), f"performance.workers={workers}")
    line = fails(capsys, *arguments)
    assert "expected readable images, got 20 in a row that are not: " in line
    assert line.endswith(".png: not an image of a known format\n")


def test_unlabelled_data_trains_but_is_not_scored(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, picture in enumerate(images.glob("*/*.png")):
        picture.rename(flat / f"{i}.png")
    out = tmp_path / "out"
    assert main(pretrain(out, "--data", str(flat), "run.evaluate_every=1")) == 0
    capsys.readouterr()
    assert "expected held-out images with labels, got none (no labels)" in fails(capsys, "evaluate", str(out))


def test_own_images_end_to_end(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, models = tmp_path / "out", tmp_path / "models"
    assert main(pretrain(out, "--data", str(images), "performance.workers=1")) == 0
    plot = tmp_path / "plot.png"
    assert main(["evaluate", str(out), "--initial", "--plot", str(plot)]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert [(r["width"], r["depth"]) for r in report["subnets"]] == [(16, 1), (16, 2), (32, 1), (32, 2)]
    assert report["settings"]["query_images"] == 4
    assert (
        report["settings"]
        | {"run": str(out), "branch": "teacher", "step": 6, "data": str(images), "version": poa.__version__}
        == report["settings"]
    )
    assert report["subnets"][0].keys() >= {"knn", "knn_init", "params", "flops"}
    assert plot.stat().st_size > 1000
    capsys.readouterr()
    assert main(["extract", str(out), "--subnets", "16x1,32x2", "--out", str(models)]) == 0
    written = capsys.readouterr().out.split()
    assert written == [f"{models}/vit-16x1", f"{models}/vit-32x2"]
    assert all((Path(path) / "config.json").exists() for path in written)
    assert load_file(f"{written[0]}/model.safetensors")["cls_token"].shape == (1, 1, 16)


def test_an_evaluation_is_replaced_by_that_of_the_same_data_branch_and_step_alone(
    run: Run, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images.parent)
    cases = [[], ["--data", "images"], ["--branch", "student"], ["--data", str(images)], ["--step", "3"]]
    written = []
    for arguments in cases:
        assert main(["evaluate", str(run), "--subnets", "16x1", *arguments]) == 0
        about, *_, file = capsys.readouterr().out.splitlines()
        settings = json.loads(Path(file).read_text())["settings"]
        assert about == f"{run}: {settings['branch']} of step {settings['step']}"
        written.append((Path(file).name, settings["data"], settings["branch"], settings["step"]))
    assert written == [
        ("evaluation.json", "digits", "teacher", 6),
        ("evaluation-2.json", str(images), "teacher", 6),
        ("evaluation-3.json", "digits", "student", 6),
        ("evaluation-2.json", str(images), "teacher", 6),
        ("evaluation-4.json", "digits", "teacher", 3),
    ]
    narrow = json.loads((run / "evaluation-2.json").read_text())
    for arguments in (["--subnets", "32x2"], ["--subnets", "16x1", "--retrieval"]):
        assert main(["evaluate", str(run), "--data", str(images), *arguments]) == 0
    merged = json.loads((run / "evaluation-2.json").read_text())
    assert {**merged["settings"], "retrieval": 0} == {**narrow["settings"], "retrieval": 0}
    protocols = [(row["subnet"], "retrieval" in row) for row in merged["subnets"]]
    assert protocols == [("16x1", True), ("32x2", False)]
    assert narrow["subnets"][0].items() <= merged["subnets"][0].items()


def test_resume_of_a_finished_run_changes_nothing(run: Run) -> None:
    before = contents(run)
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert contents(run) == before


def test_config_of_another_run(run: Run, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(run / "config.json"), "--out", str(again)]) == 0
    assert (again / "config.json").read_bytes() == (run / "config.json").read_bytes()
    first, second = (torch.load(RunFolder(folder).checkpoints()[-1].path) for folder in (run, again))
    assert all(torch.equal(first["teacher"][k], second["teacher"][k]) for k in first["teacher"])


def test_loader(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "notes.md").touch()
    assert main(["loader", "--data", str(images), "--workers", "0", "1", "--seconds", "0.2"]) == 0
    about, left_out, *speeds = capsys.readouterr().out.splitlines()
    assert left_out == "left out: 1 without an ending of images (notes.md)"
    assert about == "8 images, canvas of 32 pixels, batches of 64"
    assert [line.partition(" images/s")[0].split()[:2] for line in speeds] == [
        ["0", "workers:"],
        ["1", "workers:"],
    ]
    assert all(float(line.split()[2].replace(",", "")) > 0 and "images/s per core" in line for line in speeds)


def test_subnets(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subnets", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["subnet"], r["width"], r["depth"], r["draws"]) for r in rows] == [
        ("16x1", 16, 1, 9),
        ("16x2", 16, 2, 3),
        ("32x1", 32, 1, 3),
        ("32x2", 32, 2, 0),
    ]
    assert main(["subnets", "--preset", "vit-l16"]) == 0
    assert capsys.readouterr().out.startswith("143 subnets")


UNFINISHED = {"of", "for", "to", "likewise", "the", "whose", "instead", "until", "default", "only"}


def test_one_grammar() -> None:
    """Commands come in the order of work; a run comes first, its options last, all else has a name."""
    (group,) = (a for a in _parser([])._actions if isinstance(a, argparse._SubParsersAction))
    work = (
        "quickstart subnets data memory warmup loader pretrain finetune report evaluate latency select"
        " extract embed pairs pictures"
    )
    assert list(group.choices) == work.split()
    about_data = group.choices["data"]._actions[1].choices.items()
    for name, command in [*about_data, *((n, c) for n, c in group.choices.items() if n != "data")]:
        unnamed = [a.dest for a in command._actions if not a.option_strings]
        assert [dest for dest in unnamed if dest != "overrides"] in (
            ["run"], ["path"], ["model", "images"], ["features"], []
        ), name  # fmt: skip
        reads_a_run = name in ("subnets", *work.split()[7:13], "pictures")
        assert ("run" in unnamed) == reads_a_run
        assert ("--preset" in command.flags) == (name in work.split()[1:7])
        assert not unfinished(command), name


def unfinished(command: argparse.ArgumentParser) -> list[str | None]:
    """Lines of help that do not say what they are about."""
    return [a.help for a in command._actions if not a.help or a.help.split()[0] in UNFINISHED]


@pytest.mark.parametrize("program", ["benchmarks", "elastic_kernels"])
def test_the_same_grammar_elsewhere(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(SystemExit):
        importlib.import_module(f"{program}.__main__").main([])
    (group,) = (a for a in parsers[0]._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in group.choices.items():
        unnamed = [a.dest for a in command._actions if not a.option_strings]
        assert unnamed in (["overrides"], ["rows"], []) and not unfinished(command), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"poa {poa.__version__}, PyTorch {torch.__version__}\n"


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e30", "many", ""])
@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "RUN", "--subnets", "all", "--step"],
        ["evaluate", "RUN", "--step"],
        ["extract", "RUN", "--subnets", "all", "--image-size"],
        ["loader", "--data", "digits", "--seconds"],
    ],
    ids=lambda a: a[0] + a[-1],
)
def test_absurd_numbers(arguments: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *arguments, value)
    assert line.startswith(f"poa: error: argument {arguments[-1]}: expected a ")


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--preset", "vit-l16", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key, _, _, explanation in describe(preset("vit-l16")):
        assert f"  {key}=" in text
        assert explanation in text
    assert "method.backbone.max_width=1024" in text
    assert (
        "options of method.backbone.kind=swin, with their defaults:\n  method.backbone.image_size=224" in text
    )


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "poa", "pretrain", "--data", "nowhere", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "poa: error: data: expected 'digits', a folder of images, a list (.txt), or shards "
        f"(.tar, .parquet), got 'nowhere': no such folder or file in {tmp_path}\n"
    )
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_reader_that_stops_early(tmp_path: Path) -> None:
    command = f"{sys.executable} -m poa subnets --preset vit-l16 | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("143 subnets")
    assert done.stderr == ""


def test_plot_without_matplotlib(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "expected matplotlib" in fails(capsys, "evaluate", str(run), "--plot", "accuracy.png")
    assert contents(run) == before
