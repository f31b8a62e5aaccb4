"""Runs from Python: `pretrain`, and what can be asked of a run. The command line calls these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poa import train
from poa.backbones.base import BackboneConfig
from poa.checkpoint import Branch, RunFolder
from poa.config import Config, with_data, with_run, with_teacher
from poa.data.layout import Images, Openers, named
from poa.device import choose_device, use_threads
from poa.embedding import Embeddings, embed
from poa.errors import InputError
from poa.evaluate import Report, number_format
from poa.evaluate.runs import evaluate_run
from poa.evaluate.sweep import data_place
from poa.export import ExportedModel, load
from poa.finetune import FinetuneConfig, finetune
from poa.finetune import recipe as recipe_of
from poa.finetune import resume as resume_finetuning
from poa.initialization import in_order_of, initial_config
from poa.metrics import Callback
from poa.options import differences, override
from poa.report import curves_of, evaluations, summary
from poa.selection.latency import LatencyTable
from poa.selection.quality import Weights, agreement_quality, knn_quality
from poa.selection.select import Budgets, Selection, known_costs, measure_run, select
from poa.subnets import Subnet
from poa.table import Table


def pretrain(
    data: Images | None = None,
    preset: str | Config | None = None,
    *,
    out: str | Path | None,
    init: str | None = None,
    teacher: str | None = None,
    resume: bool = False,
    check: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Train a run to its end.

    Args:
        data: images to train on, alone or with labels; default those of the preset.
        preset: name of the preset whose options are used, or a whole configuration; default quickstart, with
            `init` elastic, or the options of that run.
        out: the run folder, new; None only to `check`.
        init: initial weights, whose backbone is used: `timm:NAME`, the folder of a model or of a run, or a
            file.
        teacher: another, frozen teacher, named as weights are; see `method.teacher.frozen`.
        resume: resume the run in `out` if there is one.
        check: only print which images were found and what the run would do.
        callbacks: called with each row of the metrics: logged steps, evaluations (`row["knn"]`) and alarms.
        options: of the run, by the ends of their names, such as `epochs=10`, or by whole names, such as
            `**{"method.optim.epochs": 10}`.

    Raises:
        InputError: wrong options or data; nothing is written then.
        Preempted: it was asked to stop, as by an interrupt of a notebook's cell; it can be resumed.

    Example:
        >>> import poa, torch
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8))
        >>> run = poa.pretrain(  # doctest: +ELLIPSIS
        ...     dataset, "small-images", out="runs/mine", check=True, epochs=5, **{"crops.jitter": 0.4}
        ... )
        device: ...
        data: 200 images of dataset:TensorDataset to train on without labels; none held out (no labels)
        ...
    """
    if not (out or check):
        raise InputError(f"out: expected the folder of the run, got {out!r}; only check=True needs none")
    config = override(with_teacher(initial_config(preset, init, options), teacher), options)
    config, openers = _with_images(config, data)
    folder = RunFolder(Path(out or "."))
    resume = resume and bool(folder.checkpoints())
    if resume:
        config = in_order_of(config, folder.config())
    if out and not resume:
        folder.require_new()
    train.pretrain(config, folder.path, resume=resume, check=check, openers=openers, callbacks=callbacks)
    return Run(folder.path, data)


class Run:
    """A run, by its folder.

    Args:
        path: of the folder.
        data: its images, where it was trained on a dataset, which lies in no file.

    Example:
        >>> import poa
        >>> run = poa.Run("runs/first")
        >>> run.subnet("16x1")("photo.jpg").shape
        torch.Size([1, 16])
    """

    def __init__(self, path: str | Path, data: Images | None = None):
        self.folder = RunFolder(Path(path))
        self.data = data

    @property
    def config(self) -> Config:
        """All options."""
        return self.folder.config()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        return self.folder.rows()

    def resume(
        self,
        data: Images | None = None,
        config: Config | None = None,
        *,
        replan: bool = False,
        check: bool = False,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> Run:
        """Train on from the newest checkpoint; the arguments are those of `pretrain`.

        A run of fine-tuning goes on, too, with the options that it has.

        Args:
            config: the options; default those it was started with.
            replan: allow other `method.optim` options, whose schedules are recomputed.

        Raises:
            InputError: no checkpoint of these options, or other schedules without `replan`.
        """
        before, asked = self.config, bool(config or options or replan or check or callbacks)
        config, openers = _with_images(config or before, self.data if data is None else data)
        if self.folder.is_fine_tuned():
            if asked:
                raise InputError(
                    "resume: expected a run of pre-training with options, got one of fine-tuning, which has "
                    "them already: poa finetune --resume RUN"
                )
            resume_finetuning(self.folder.path, config, openers)
            return self if data is None else Run(self.folder.path, data)
        config = override(config, options)
        changed = next(differences(config.method.optim, before.method.optim), None)
        if changed and not replan:
            raise InputError(
                f"method.optim.{changed[0]}: expected {changed[2]} as the run was planned, got {changed[1]}; "
                "--replan recomputes its schedules"
            )
        path = self.folder.path
        train.pretrain(config, path, resume=True, check=check, openers=openers, callbacks=callbacks)
        return self if data is None else Run(path, data)

    def models(self) -> Table:
        """The subnets with their sizes, and what evaluations scored."""
        scores = evaluations(self.folder)
        rows = subnet_rows(self.config.method.backbone)
        for title, column in scores.items():
            for row in rows:
                row[title] = column.get(row["subnet"])
        formats = {t: number_format(t.rpartition(": ")[2]) for t in scores}
        return Table(rows, {"params": ",", "flops": ".3g"} | formats)

    def subnet(
        self, name: str | Subnet | None = None, *, branch: Branch = "teacher", step: int | None = None
    ) -> ExportedModel:
        """A subnet, such as `384x12`, as a model of its own; default the intact network. See `poa.load`."""
        return load(self.folder.path, name, branch=branch, step=step)

    def embed(
        self,
        subnet: str | Subnet | None = None,
        data: Images | None = None,
        *,
        branch: Branch = "teacher",
        step: int | None = None,
        **options: Any,
    ) -> Embeddings:
        """Features of images, default those of the run; `options` are those of `poa.embed`."""
        model = self.subnet(subnet, branch=branch, step=step)
        images = self.data if data is None else data
        return embed(model, self.config.data.source if images is None else images, **options)

    def evaluate(
        self,
        subnets: str | Sequence[str] = "all",
        data: Images | None = None,
        *,
        protocols: str | Sequence[str] = (),
        initial: bool = False,
        baselines: bool = False,
        branch: Branch = "teacher",
        step: int | None = None,
        device: str = "auto",
        out: str | Path | None = None,
        plot: str | Path | None = None,
        **folders: str | Path | Sequence[str | Path],
    ) -> Report:
        """Score subnets on held-out images, and write the scores into the folder.

        Args:
            subnets: names such as `384x12`, or all.
            data: images; default those of the run.
            protocols: besides k-NN, such as `linear`; `standard`: all whose packages are installed.
            initial: score the weights before training, too.
            baselines: score raw pixels and histograms of their values, too.
            branch, step: whose weights, of which checkpoint; default the newest.
            device: auto, cpu, cuda or cuda:N.
            out: JSON file; default `evaluation.json` in the folder, of other data `evaluation-2.json`.
            plot: a picture, too, of accuracy against size.
            folders: of protocols that have images of their own, such as `segmentation="scenes"`, or with
                options `detection=["coco", "epochs=1"]`.

        Raises:
            InputError: wrong subnets, protocols, data or places; no held-out images with labels.
        """
        config, openers = _with_images(self.config, self.data if data is None else data)
        return evaluate_run(
            Weights(self.folder, branch, step),
            with_run(config, device=device),
            openers,
            [subnets] if isinstance(subnets, str) else subnets,
            [protocols] if isinstance(protocols, str) else protocols,
            folders,
            initial=initial,
            baselines=baselines,
            out=Path(out) if out else None,
            plot=Path(plot) if plot else None,
        )

    def finetune(
        self,
        out: str | Path,
        data: Images | None = None,
        *,
        subnet: str | Subnet | None = None,
        recipe: str | FinetuneConfig = "short",
        device: str = "auto",
        step: int | None = None,
        **options: Any,
    ) -> Run:
        """Train classifiers on labelled images: all subnets in one elastic run, or one of them alone.

        Args:
            out: folder of the new run.
            data: images with labels; default those of the run.
            subnet: name such as `384x12`, fine-tuned alone; default all.
            recipe: whose options are used, or all options; `poa finetune --help` lists them.
            device: auto, cpu, cuda or cuda:N.
            step: of the checkpoint whose teacher is fine-tuned; default the newest.
            options: changes to the recipe, such as `epochs=10` or `share=0.1`.

        Returns:
            The new run; its models have classifiers.

        Raises:
            InputError: wrong options, no labels or no held-out images; nothing is written then.
            Preempted: it was asked to stop, and was saved; `Run.resume` goes on.
        """
        config, openers = _with_images(self.config, self.data if data is None else data)
        chosen = override(recipe_of(recipe) if isinstance(recipe, str) else recipe, options)
        alone = None if subnet is None else config.method.backbone.space.named([str(subnet)])[0]
        RunFolder(Path(out)).require_new()
        config = with_run(config, device=device)
        finetune(self.folder, config, chosen, Path(out), subnet=alone, step=step, openers=openers)
        return Run(out, self.data if data is None else data)

    def latency(
        self,
        subnets: str | Sequence[str] = "all",
        *,
        sample: int | None = None,
        device: str = "auto",
        threads: int | None = None,
        batch: int = 1,
        image_size: int | None = None,
        runtime: str = "torch",
        seconds: float = 2.0,
        out: str | Path | None = None,
    ) -> LatencyTable:
        """Measure how long subnets take on this machine, as networks of their own; write it into the folder.

        Args:
            subnets: names such as `384x12`, or all.
            sample: measure so many, spread over all, and interpolate the others.
            device: auto, cpu, cuda or cuda:N.
            threads: CPU threads of PyTorch; default `OMP_NUM_THREADS`, or one on a CPU if that is not set.
            batch: images of a call.
            image_size: pixels; default that of the run.
            runtime: torch, compile or onnxruntime.
            seconds: of measuring each.
            out: JSON file; default `latency-DEVICE.json` in the folder.

        Raises:
            InputError: wrong subnets, sizes or places; a table of another machine lies there.
        """
        names = [subnets] if isinstance(subnets, str) else subnets
        return measure_run(
            self.folder, names, sample, device,
            threads=threads, batch=batch, image_size=image_size, runtime=runtime, seconds=seconds,
            out=Path(out) if out else None,
        )  # fmt: skip

    def select(
        self,
        data: Images | None = None,
        *,
        rank: str = "knn",
        cost: str = "params",
        branch: Branch = "teacher",
        step: int | None = None,
        images: int = 1000,
        device: str = "auto",
        **budgets: Any,
    ) -> Selection:
        """The best subnet within budgets, and the Pareto front.

        Args:
            data: images that an evaluation was made on, or that `agreement` takes; default those of the run.
            rank: "knn", by the accuracies of `evaluate`; or "agreement", without labels: by CKA with the
                intact network.
            cost: of the Pareto front without other budgets: params, flops or the name of a latency table.
            branch, step: whose weights, of which checkpoint; default the newest.
            images: so many at most for the agreement, which is computed on `device`.
            budgets: `max_params`, `max_flops`, `max_ms` (a number, or one by name of a latency table, such as
                `{"cpu": 5}`) and `min_knn`.

        Raises:
            InputError: none is within the budgets, or what they are about was not measured or evaluated.

        Example:
            >>> import poa
            >>> run = poa.Run("runs/first")
            >>> run.select(rank="agreement", images=20, max_params=7e3).best
            '16x1'
        """
        allowed, weights = Budgets.of(budgets), Weights(self.folder, branch, step)
        if rank not in ("knn", "agreement"):
            raise InputError(f"rank: expected knn or agreement, got {rank!r}")
        if allowed.min_knn is not None and rank != "knn":
            raise InputError("--min-knn: expected --rank knn with it, got --rank agreement")
        known = known_costs(self.folder, allowed, cost)
        config, openers = _with_images(self.config, self.data if data is None else data)
        if rank == "knn":
            where = None if data is None else data_place(config.data.source)
            quality = knn_quality(weights, where, self.config.data.source)
        else:
            chosen = choose_device(device)
            use_threads(config.performance.threads, chosen)
            quality = agreement_quality(weights, config, images, chosen, openers)
        return select(self.folder, quality, known, allowed.min_knn)

    def plot(self) -> Any:
        """The curves of the run, a figure of matplotlib."""
        return curves_of([self.folder])

    def __repr__(self) -> str:
        return f"run {self.folder.path}\n{self._figures()!r}"

    def _repr_html_(self) -> str:
        return f"<p>run {self.folder.path}</p>{self._figures()._repr_html_()}"

    def _figures(self) -> Table:
        rows = self.metrics
        figures = summary(rows) if any("loss" in row for row in rows) else {"steps": "none logged yet"}
        return Table({"": name, "value": value} for name, value in figures.items())


def subnet_rows(backbone: BackboneConfig) -> list[dict[str, Any]]:
    """Names and sizes of all subnets, and how often a round of draws takes each."""
    counts = Counter(backbone.space.round_of_draws())
    return [
        {
            "subnet": str(s),
            "width": s.width,
            "depth": s.depth,
            "params": backbone.parameters(s),
            "flops": backbone.flops(s),
            "draws": counts[s],
        }
        for s in backbone.space
    ]


def _with_images(config: Config, data: Images | None) -> tuple[Config, Openers | None]:
    """The configuration with the name of the images, and how to open them where no name says it."""
    if data is None:
        return config, None
    name, openers = named(data)
    return with_data(config, name), openers
