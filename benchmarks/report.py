"""README tables and plots out of measured rows, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, results
from benchmarks.results import Row
from poa.drawing import write_figure
from poa.files import write_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PLOTS = results.FOLDER / "plots"
BEGIN, END = "<!-- benchmarks: written by `python -m benchmarks report` -->", "<!-- benchmarks: end -->"
NOTHING = "No other figures are measured yet."
OPERATORS_ASIDE = ("step", "step part", "network", "quality", "ceilings", "profile", "test")


def check(rows: Iterable[Row]) -> None:
    """Raise ValueError for a row that no GPU measured: such figures are not published."""
    for row in rows:
        known = row["driver"] not in ("none", "unknown")
        if not (row["device"] == "cuda" and row["gpu"].startswith("NVIDIA") and known):
            raise ValueError(
                "report: expected rows measured on an NVIDIA GPU, got "
                f"device {row['device']!r}, gpu {row['gpu']!r}, driver {row['driver']!r} ({row['op']})"
            )


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each measurement; files are in the order of time."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        point = (row.get("seconds"),) if row["op"] == "quality" else ()
        key = (row["gpu"], row["op"], row["provider"], row["mode"], row["shape"], row["dtype"], *point)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def write(paths: Sequence[Path], readme: Path = README, plots: Path = PLOTS) -> None:
    """Renew the README's lines between the two markers, and the plots, from files of rows. Raises ValueError:
    rows that no GPU measured, or a README without the markers."""
    rows = results.load(paths)
    check(rows)
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the markers {BEGIN!r} and {END!r} once each")
    rows = newest(rows)
    pictures = draw(rows, plots)
    plotted = (f"![{p.stem}]({p.relative_to(readme.parent)})" for p in pictures)
    body = "\n\n".join([goal_table(rows), *(sections(rows) or [NOTHING]), *plotted])
    head, rest = text.split(BEGIN)
    write_text(readme, f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}")
    print(f"{readme}: {len(rows)} rows, {len(pictures)} plots")


def sections(rows: Sequence[Row]) -> list[str]:
    """Markdown of all tables, by GPU."""
    texts = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        mine = [row for row in rows if row["gpu"] == gpu]
        newest_row = mine[-1]
        texts.append(
            f"**{gpu}**, driver {newest_row['driver']}, torch {newest_row['torch']}, Triton "
            f"{newest_row['triton']}, commit {newest_row['commit']}, {newest_row['date']}."
        )
        tables = (step_table, network_table, kernel_table, quality_table)
        texts += [text for text in (table(mine) for table in tables) if text]
    return texts


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|" + "|".join("---:" if i > 1 else "---" for i in range(len(head))) + "|"
    return "\n".join(
        ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]
    )


def goal_table(rows: Sequence[Row]) -> str:
    """Goals by GPU, whether measured or not."""
    head = ("ViT-L/16, 64 images, images/s", "accept", "target", "stretch", "bound of the model", "measured")
    return markdown(head, goals.goal_lines(rows))


def kernel_table(rows: Sequence[Row]) -> str:
    """Forward and backward of every problem: ours, the best peer by name, the share of the floor."""
    lines = []
    for (op, shape), several in _by(rows, "op", "shape").items():
        both = {row["provider"]: row for row in several if row["mode"] == "fwd+bwd"}
        if op in OPERATORS_ASIDE or "ours" not in both:
            continue
        ours = both.pop("ours")
        line = [op, shape, _time(ours)]
        if both:
            best = min(both.values(), key=lambda row: row["p50"])
            line += [f"{best['provider']} {_time(best)}", f"{best['p50'] / ours['p50']:.2f}x"]
        else:
            line += ["none ran", ""]
        line.append(f"{ours['share_of_floor']:.0%}" if "share_of_floor" in ours else "")
        lines.append(line)
    head = ("operator", "crops, sizes", "ours, us", "best peer, us", "peer / ours", "share of floor")
    return markdown(head, lines) if lines else ""


def _time(row: Row) -> str:
    """Microseconds, and whether those of launches are among them."""
    return f"{row['p50']:.0f}" + (" with launches" if row.get("unhidden", 0) > 0.5 else "")


def step_table(rows: Sequence[Row]) -> str:
    """Images a second of the mix of subnets, and of single ones; the compiled peer has these alone."""
    lines = []
    columns = {"images_per_s": "{:.0f}", "mfu": "{:.1%}", "peak_mib": "{:.0f}", "share_of_floor": "{:.0%}"}
    mine = [row for row in rows if row["op"] == "step"]
    for (provider, shape), several in _by(mine, "provider", "shape").items():
        mix: Row = next((row for row in several if row["mode"] == "mix"), {})
        figures = ["" if mix.get(key) is None else text.format(mix[key]) for key, text in columns.items()]
        single = [f"{row['mode']} {row['images_per_s']:.0f}" for row in several if row["mode"] != "mix"]
        lines.append([provider, shape, *figures, ", ".join(single)])
    head = "step", "network, images", "images/s", "MFU", "peak MiB", "share of floor", "one subnet, images/s"
    return markdown(head, lines) if lines else ""


def network_table(rows: Sequence[Row]) -> str:
    """Images a second of every subnet and provider, forward and with its backward."""
    lines = []
    mine = [row for row in rows if row["op"] == "network"]
    for (shape, provider), several in _by(mine, "shape", "provider").items():
        speed = {row["mode"]: f"{row['images_per_s']:.0f}" for row in several}
        lines.append([provider, shape, speed.get("fwd", ""), speed.get("fwd+bwd", "")])
    head = ("network", "subnet, images", "forward, images/s", "with backward")
    return markdown(head, lines) if lines else ""


def quality_table(rows: Sequence[Row]) -> str:
    """The last accuracy of each provider and subnet."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["op"] == "quality":
            last[row["shape"], row["mode"], row["provider"]] = row
    text = "{provider}|{mode} on {shape}|{seconds:.0f}|{images}|{accuracy:.1%}"
    lines = [text.format(**row).split("|") for row in last.values()]
    head = ("training", "teacher subnet", "seconds", "images", "k-NN")
    return markdown(head, lines) if lines else ""


def _by(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Bars against peers, shares of the floor, accuracy over time; only what there are rows for."""
    ours = [r for r in rows if r["op"] not in OPERATORS_ASIDE and r["provider"] == "ours"]
    wanted = [
        ("step", _draw_step, [r for r in rows if r["op"] == "step" and r["mode"] == "mix"]),
        ("roofline", _draw_roofline, ours),
        ("quality", _draw_quality, [r for r in rows if r["op"] == "quality"]),
    ]
    paths = []
    for name, function, mine in wanted:
        if mine:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot

            figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
            function(axes, mine)
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{name}.png")
            write_figure(figure, paths[-1], 110)
            pyplot.close(figure)
    return paths


def _draw_step(axes: Any, rows: Sequence[Row]) -> None:
    labels = [f"{row['provider']}\n{row['batch']} images" for row in rows]
    colours = ["tab:blue" if row["provider"] == "ours" else "tab:gray" for row in rows]
    axes.bar(labels, [row["images_per_s"] for row in rows], color=colours)
    axes.set_ylabel("images/s, mix of subnets")
    axes.tick_params(axis="x", labelsize=7)


def _draw_roofline(axes: Any, rows: Sequence[Row]) -> None:
    """Arithmetic intensity against what was reached."""
    for (op,), several in _by(rows, "op").items():
        moving = [row for row in several if row["tflop_per_s"]]
        intensity = [row["tflop_per_s"] * 1e3 / row["gb_per_s"] for row in moving]
        if moving:
            axes.plot(intensity, [row["tflop_per_s"] for row in moving], "o", label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_quality(axes: Any, rows: Sequence[Row]) -> None:
    for (which, mode), several in _by(rows, "provider", "mode").items():
        style = "-o" if which == "ours" else "--s"
        points = zip(*((row["seconds"], 100 * row["accuracy"]) for row in several), strict=True)
        axes.plot(*points, style, label=f"{which} {mode}")
    axes.set(xlabel="seconds of training", ylabel="k-NN accuracy, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
