"""The memory that a step is predicted to need."""

from __future__ import annotations

import pytest
import torch

from elastic_kernels import backend
from helpers.launches import Launches
from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.config import MOST_IMAGES
from poa.errors import InputError
from poa.memory import BLOCK, Living, largest_batch_size, planned_gradients, planned_state, predict_memory
from poa.options import override
from poa.presets import preset
from poa.subnets import Subnet


def test_living_tensors_are_added_up() -> None:
    with Living() as living:
        a = torch.empty(1000, device="meta")
        b = a + 1
        view = b[:10]
        assert living.now == 2 * 8 * BLOCK
        del b
        assert living.now == 2 * 8 * BLOCK  # the view holds it
        del view
        assert living.now == 8 * BLOCK
        a.mul_(2)
    assert (living.now, living.peak) == (8 * BLOCK, 2 * 8 * BLOCK)


def test_weights_and_moments() -> None:
    """16 bytes a parameter in fp32; working copies of linear layers in half precision."""
    exact, half = (predict_memory(tiny_config(f"method.precision={p}")) for p in ("fp32", "bf16"))
    parameters = exact.buckets // 4
    assert 16 * parameters <= exact.fixed <= 16 * parameters + 400 * BLOCK  # of small tensors
    assert exact.fixed < half.fixed < exact.fixed + 2 * 2 * parameters + 400 * BLOCK


def test_what_saves_memory() -> None:
    config = preset("vit-s16")

    def peak(*changes: str, elastic: Subnet | None = None) -> int:
        return predict_memory(override(config, list(changes)), 64, elastic).peak

    smallest, together = config.method.backbone.space.smallest, "performance.backward=together"
    plain, one_backward = peak(), peak(together)
    assert plain < 0.8 * one_backward
    assert peak("performance.recompute=true") < 0.8 * plain
    assert peak("performance.recompute=true", together) < 0.6 * one_backward
    assert peak(together, elastic=smallest) < 0.8 * one_backward
    assert peak("method.precision=fp32") > 1.5 * plain
    blocks, hidden, kept_rows = 12, 4 * 384, 0.8 * 64 * (2 * 197 + 8 * 37)
    kept = peak("performance.keep_activations=true") - plain
    assert kept == pytest.approx(2 * blocks * hidden * kept_rows, rel=0.1)


def test_the_largest_micro_batch_fits_and_no_larger_one_does() -> None:
    config = preset("vit-s16")
    images = largest_batch_size(config, 24)
    assert images and images % 8 == 0
    assert predict_memory(config, images).fits(24)
    assert not predict_memory(config, images + 8).fits(24)
    assert largest_batch_size(config, 3) == 0


def test_no_micro_batch_is_larger_than_an_option_can_say() -> None:
    assert largest_batch_size(tiny_config(), 1000) == MOST_IMAGES
    similar = tiny_config("method.loss.features=1")  # between all images of a micro-batch
    images = largest_batch_size(similar, 24)
    assert predict_memory(similar, images).fits(24) and not predict_memory(similar, images + 8).fits(24)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--preset", "vit-s16", "method.batch_size=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("16 images per GPU: ") and len(lines) == 7


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match="expected fused or torch for a prediction, got apex"):
        predict_memory(tiny_config("performance.optimizer=apex"))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "change", ["recompute=false", "recompute=true", "backward=together", "keep_activations=true"]
)
def test_prediction_and_measurement(change: str) -> None:
    """Within 5 % of what the allocator counts."""
    from benchmarks.step import Ours, setting

    config = override(preset("vit-s16"), [f"performance.{change}", "run.device=cuda"])
    intact = config.method.backbone.space.intact
    step = Ours(setting(config, 64, torch.device("cuda")))
    step.passes[intact] = step.drawn_passes(intact)
    step.step(intact)
    torch.cuda.reset_peak_memory_stats()
    step.step(intact)
    assert predict_memory(config, 64).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)


def test_bytes_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Of ViT-L/16, 64 images and 640x18, forward and backward, by operators: both backends in fp32, and as
    trained. The official step, traced alike in half precision, moves 850 GB."""
    moved = {}
    for name, precision in (("reference", "fp32"), ("triton", "fp32"), ("triton", "bf16")):
        config = override(preset("vit-l16"), [f"method.precision={precision}"])
        with backend(name):
            state = planned_state(config)
            with Launches() as launches:
                planned_gradients(config, state, Subnet(640, 18))
        moved[name, precision] = launches.bytes
        with capsys.disabled():
            print(f"\n{name} {precision}: {launches.bytes / 1e9:.0f} GB")
    assert moved["triton", "fp32"] < 0.5 * moved["reference", "fp32"]
    assert moved["triton", "bf16"] < 0.5 * 850e9
