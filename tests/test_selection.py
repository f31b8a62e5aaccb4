"""Choosing a subnet: budgets, the Pareto front, latency tables, agreement without labels."""

from __future__ import annotations

import html
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import poa
from helpers.commands import contents, fails
from poa.__main__ import main
from poa.errors import InputError
from poa.evaluate.quality import rankme
from poa.presets import PRESETS, preset
from poa.selection.choice import Candidate, Cost, choose
from poa.selection.latency import Latency, LatencyTable, Setting, fewest_sampled, interpolated, sampled
from poa.selection.quality import linear_cka
from poa.selection.runtimes import CALLS, QUIET, WARM, interleaved
from poa.subnets import SearchSpace, Subnet

CPU = torch.device("cpu")
QUALITIES = {(1, 1): 0.5, (1, 2): 0.7, (2, 1): 0.6, (2, 2): 0.7, (3, 1): 0.8}


def candidates() -> list[Candidate]:
    """Whose params are ten times the width and whose ms are the depth."""
    return [
        Candidate(Subnet(w, d), quality, {"params": 10.0 * w, "ms": d})
        for (w, d), quality in QUALITIES.items()
    ]


def costs(params: float | None = None, ms: float | None = None) -> list[Cost]:
    return [Cost("params", ".0f", params), Cost("ms", ".1f", ms)]


@pytest.mark.parametrize(
    ("limits", "least", "best", "dominated"),
    [
        ((None, None), None, (3, 1), {(1, 1): (1, 2), (2, 1): (1, 2), (2, 2): (1, 2)}),
        ((20, None), None, (1, 2), {(1, 1): (1, 2), (2, 1): (1, 2), (2, 2): (1, 2)}),
        ((None, 1), None, (3, 1), {(1, 1): (3, 1), (1, 2): (3, 1), (2, 1): (3, 1), (2, 2): (3, 1)}),
        ((20, 1), None, (2, 1), {(2, 2): (1, 2)}),
        ((None, None), 0.6, (1, 2), {(1, 1): (1, 2), (2, 1): (1, 2), (2, 2): (1, 2)}),
        ((20, 1), 0.6, (2, 1), {(2, 2): (1, 2)}),
    ],
)
def test_the_best_within_budgets(
    limits: tuple[float, float], least: float | None, best: tuple[int, int], dominated: dict
) -> None:
    choice = choose(candidates(), costs(*limits), "20-NN", ".0%", least)
    assert choice.best.subnet == Subnet(*best)
    assert choice.dominated == {Subnet(*a): Subnet(*b) for a, b in dominated.items()}
    assert choice.best in choice.front and len(choice.front) == 5 - len(dominated)


@pytest.mark.parametrize(
    ("limits", "least", "message"),
    [
        ((9, 1), None, "params at most 9, ms at most 1, got none of 5; the nearest is 1x1 with params 10"),
        (
            (None, 0.5),
            0.75,
            "ms at most 0.5, 20-NN at least 75%, got none of 5; the nearest is 3x1 with ms 1.0, 20-NN 80%",
        ),
        ((None, 1e-4), None, "expected a subnet with ms at most 0.0001, got none of 5"),
        ((None, None), 0.9, "20-NN at least 90%, got none of 5; the nearest is 3x1 with 20-NN 80%"),
    ],
)
def test_a_budget_that_nothing_fits_names_the_nearest(
    limits: tuple[float, float], least: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose(candidates(), costs(*limits), "20-NN", ".0%", least)


def table(latencies: dict[Subnet, Latency]) -> LatencyTable:
    return LatencyTable(Setting("cpu", "a CPU", 1, 1, 32, "torch", "2"), latencies, 0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_interpolation_is_exact_for_a_quadratic_in_the_width_linear_in_the_blocks(name: str) -> None:
    space = preset(name).method.backbone.space

    def truth(subnet: Subnet) -> float:
        w = subnet.width / space.widths[-1]
        return 1 + w + sum((3 + w + w * w) * blocks for blocks in subnet.blocks)

    subnets = sampled(space, fewest_sampled(space))
    assert len(set(subnets)) == min(fewest_sampled(space), len(space))
    whole = interpolated(table({s: Latency(truth(s), 2 * truth(s), 1) for s in subnets}), space)
    assert whole.error and whole.error["largest"] < 1e-9 and whole.error["subnets"] > 0
    for subnet in space:
        latency = whole.latencies[subnet]
        assert (latency.how == "measured") == (subnet in subnets)
        assert [latency.median, latency.p95] == pytest.approx([truth(subnet), 2 * truth(subnet)], abs=1e-4)


def test_interpolation_needs_subnets_that_determine_the_others() -> None:
    space = SearchSpace((16, 32), (1, 2, 3))
    same_depth = table({Subnet(w, 1): Latency(1, 1, 1) for w in space.widths})
    with pytest.raises(
        InputError, match="expected at least 6 subnets that determine the others, got 16x1, 32x1"
    ):
        interpolated(same_depth, space)


def test_a_drift_hits_all_alike_and_disturbed_calls_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down threefold; every call of `b` but its first 100 loses the CPU."""
    done: list[str] = []

    def timed(call: object, _: object) -> tuple[float, int]:
        done.append(call())  # type: ignore[operator]
        return 1 + len(done) / 500, int(done[-1] == "b" and done.count("b") > 100)

    monkeypatch.setattr("poa.selection.runtimes._timed", timed)
    monkeypatch.setattr("poa.selection.runtimes.ROUNDS", (100, 100))
    times = interleaved({name: lambda name=name: name for name in "abc"}, CPU, 1e-3)
    assert len(done) == 3 * 100 * (WARM + CALLS)
    a, c = (sum(times[name].counted) / len(times[name].counted) for name in "ac")
    assert len(times["a"].counted) == 100 * CALLS and a == pytest.approx(c, rel=0.01)
    assert len(times["b"].counted) == 66 and max(times["b"].counted) < 2 < max(times["a"].counted)
    times["b"].quiet = times["b"].quiet[: QUIET - 1]
    assert len(times["b"].counted) == QUIET - 1 + 334


def test_cka_and_rankme() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 8, generator=draw)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draw))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, y) < 0.5
    assert linear_cka(x, torch.ones(50, 4)) == 0
    assert rankme(torch.eye(6)) == pytest.approx(6, abs=1e-4)
    assert rankme(torch.ones(6, 3)) == pytest.approx(1, abs=1e-4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poa.selection.runtimes.ROUNDS", (2, 2))


def test_from_a_latency_table_to_a_subnet(
    run: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run)]) == 0
    assert main(["latency", str(run), "--device", "cpu", "--batch", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{run}/latency-cpu-batch2.json"
    content = json.loads(Path(said[-1]).read_text())
    assert content["latency"]["batch"] == 2 and content["latency"]["machine"] in "\n".join(said)
    assert all(0 < row["fastest"] <= row["median"] <= row["p95"] for row in content["subnets"])

    content["subnets"][-1]["median"] = 1e6
    Path(said[-1]).write_text(json.dumps(content))  # as one that another machine wrote
    picture = run / "front.png"
    assert main(["select", str(run), "--max-ms", "cpu-batch2=9e5", "--plot", str(picture)]) == 0
    *_, last, where, advice = capsys.readouterr().out.splitlines()
    assert last.split()[0] == "32x2" and last.endswith("over the budget of cpu-batch2 ms")
    assert where == str(picture) and picture.stat().st_size
    best = advice.removeprefix(f"next: poa extract {run} --subnets ")
    accuracies = {
        row["subnet"]: row["knn"]["20"]
        for row in json.loads((run / "evaluation.json").read_text())["subnets"]
    }
    assert accuracies[best] == max(accuracies[s] for s in accuracies if s != "32x2")
    selection = poa.Run(run).select(max_ms=9e5)
    assert selection.best == best and selection.plot().axes and len(selection.rows()) == 4
    assert "<- best" in repr(selection)
    assert "<- best" in html.unescape(selection._repr_html_())
    with pytest.raises(InputError, match="expected budgets max_params, .*, got max_sec"):
        poa.Run(run).select(max_sec=1)
    with pytest.raises(InputError, match="max_ms: expected a number, got '5'"):
        poa.Run(run).select(max_ms={"cpu": "5"})
    assert main(["select", str(run), "--cost", "cpu-batch2", "--min-knn", "0.01", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    cheapest = min(printed["subnets"], key=lambda row: row["cpu-batch2 ms"])
    assert printed["best"] == cheapest["subnet"] and cheapest["dominated_by"] is None

    content["latency"]["machine"] = "another"
    Path(said[-1]).write_text(json.dumps(content))
    assert "a table of another" in fails(capsys, "latency", str(run), "--device", "cpu", "--batch", "2")


@pytest.mark.parametrize("runtime", ["compile", "onnxruntime"])
def test_other_runtimes(runtime: str, run: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime == "onnxruntime":
        for name in ("onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    subnets = "16x1" if runtime == "onnxruntime" else "16x1,16x2"  # one is compiled beside another
    assert main(["latency", str(run), "--device", "cpu", "--runtime", runtime, "--subnets", subnets]) == 0
    written = json.loads((run / f"latency-cpu-{runtime}.json").read_text())
    assert written["latency"]["runtime"] == runtime and len(written["subnets"]) == subnets.count("x")


def test_agreement_is_computed_once(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ["select", str(run), "--rank", "agreement", "--images", "20", "--max-params", "10K"]
    assert main(command) == 0
    said = capsys.readouterr().out
    rows = json.loads((run / "agreement.json").read_text())["subnets"]
    assert rows[-1]["subnet"] == "32x2" and rows[-1]["cka"] == pytest.approx(1)
    assert all(0 <= row["cka"] <= 1.0001 and row["rankme"] >= 1 for row in rows)
    assert "RankMe" in said and "over the budget of params" in said
    with monkeypatch.context() as patch:
        patch.setattr("poa.selection.quality.agreements", None)
        assert main(command) == 0
    assert capsys.readouterr().out == said
    (run / "agreement.json").unlink()
    (run / "agreement.json").mkdir()  # where nothing can be written the answer is given all the same
    assert main(command) == 0
    assert capsys.readouterr().out == said and "agreement.json was not written" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["select", "RUN"],
            "expected an evaluation of step 6 of the teacher in RUN, got none; make one: poa ",
        ),
        (
            ["select", "RUN", "--max-ms", "5"],
            "--max-ms: expected a latency table in RUN, got none; poa latency",
        ),
        (["select", "RUN", "--cost", "memory"], "--cost: expected one of params, flops, got 'memory'"),
        (
            ["select", "RUN", "--max-ms", "cpu=fast"],
            "argument --max-ms: expected a number in (0, inf), got 'fast'",
        ),
        (["select", "RUN", "--max-params", "5.5Q"], "argument --max-params: expected a number in (0, inf)"),
        (["select", "RUN", "--min-knn", "80"], "argument --min-knn: expected a number in [0, 1], got '80'"),
        (
            ["select", "RUN", "--rank", "agreement", "--min-knn", "0.5"],
            "--min-knn: expected --rank knn with it",
        ),
        (["select", "RUN", "--plot", "front.txt"], "--plot: expected a picture such as .png, got front.txt"),
        (
            ["latency", "RUN", "--sample", "2"],
            "--sample: expected a search space of at least 6 subnets, got 4",
        ),
        (["latency", "RUN", "--image-size", "30"], "multiple of the patch size 8, got 30"),
        (["latency", "RUN", "--out", "RUN/config.json"], "--out: expected a new file, or an older one"),
        (["latency", "RUN", "--runtime", "onnx"], "argument --runtime: invalid choice: 'onnx' (choose from "),
        (["latency", "RUN", "--subnets", "99x9"], "subnet 99x9: expected a width of 16, 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_questions(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    line = fails(capsys, *(word.replace("RUN", str(run)) for word in arguments))
    assert message.replace("RUN", str(run)) in line
    assert contents(run) == before
