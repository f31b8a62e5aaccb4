"""Settings out of tables, and the search for them with a clock and a compiler that are not real."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kernels import __main__ as command
from elastic_kernels import absent_gpu, dispatch, elastic_linear, tuning
from elastic_kernels import tune as search
from elastic_kernels.tuning import Entry, Key, Tunable

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.jit import JITFunction  # noqa: E402

from elastic_kernels.triton_ops import (  # noqa: E402
    attention,
    gemm,
    group_norm,
    layer_norm,
    linear,
    prototypes,
    window_attention,
)
from elastic_kernels.triton_ops.recorded import Binary, Launches  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HEAD = {"gpu": "NVIDIA Z1 80GB", "torch": "1", "triton": "2"}
WIDE, NARROW = torch.zeros(64, 4), torch.zeros(8, 2)


@dataclass(frozen=True)
class Toy:
    """Number 1 is the fallback, 2 spills, 3 gives a wrong result, 4 does not compile, 5 is the fastest."""

    number: int


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An operator with settings; its `clock` goes on as it is timed, and `timed` says what was."""
    monkeypatch.setattr(tuning, "TUNABLES", {})
    monkeypatch.setattr(tuning, "gpu_name", lambda device: HEAD["gpu"])
    tunable = Tunable("toy", lambda rows: [Toy(number) for number in range(1, 7)])
    state = SimpleNamespace(clock=0.0, timed=[], last=None)

    def run(x: Tensor) -> Tensor:
        state.last = (x.shape[0], tunable.choose(x, (tuning.power_of_2(x.shape[0]),), Toy(1)).number)
        if state.last[1] == 4:
            raise RuntimeError("PassManager::run failed\nand more")
        return x + (1 if state.last[1] == 3 else 0)

    def timed(operator: Any, milliseconds: float) -> list[float]:
        operator()
        rows, number = state.last
        state.clock += 1
        if milliseconds == search.THOROUGH:
            state.timed.append(state.last)
        return [rows * (0.6 if number == 5 else 1.0)] * 3

    @contextmanager
    def launched() -> Iterator[list[Any]]:
        kernels: list[Any] = []
        yield kernels
        kernels.append(SimpleNamespace(n_spills=24 if state.last[1] == 2 else 0))

    monkeypatch.setattr(search, "timed", timed)
    monkeypatch.setattr(search, "launched", launched)
    monkeypatch.setattr(search.time, "monotonic", lambda: state.clock)
    with torch.library._scoped_library("elastic_kernels", "FRAGMENT") as library:
        library.define("linear_toy(Tensor x) -> Tensor")
        library.impl("linear_toy", run, "CPU")
        state.operator = torch.ops.elastic_kernels.linear_toy
        yield state


def calls(operator: Any, *inputs: Tensor) -> Counter[search.Call]:
    with search.record() as counted:
        for x in inputs:
            operator(x)
    return counted


def test_the_fastest_settings_that_are_right(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    lines = list(search.tune(calls(toy.operator, NARROW, NARROW), path, 1, CPU))
    difference = lines.pop(2)
    assert difference.startswith("    Toy(number=3): left out, differs by 1 from the fallback")
    assert lines == [
        "1 settings to choose, in 1 different calls; 0 are known",
        "    Toy(number=2): left out, spills 24 registers",
        "    Toy(number=4): left out, PassManager::run failed",
        "toy float32 8: 4.8 us, fallback 8.0 us, 3 samples: Toy(number=5)",
    ]
    assert toy.timed == [(8, 1), (8, 5), (8, 6)]
    key = Key("toy", torch.float32, (8,))
    assert tuning.read(path, tuning.header(CPU)) == [Entry(key, Toy(5), 4.8, 8.0, 3)]
    assert list(path.parent.iterdir()) == [path]
    toy.timed.clear()
    (line,) = search.tune(calls(toy.operator, NARROW), path, 1, CPU)
    assert line == "0 settings to choose, in 0 different calls; 1 are known" and not toy.timed


def test_the_most_expensive_first_and_the_rest_later(toy: Any, tmp_path: Path) -> None:
    """The time ends within the second; what is finished is kept, and the next command goes on."""
    path = tmp_path / "table.json"
    counted = calls(toy.operator, WIDE, *[NARROW] * 9)
    assert list(counted.values()) == [1, 9]
    lines = list(search.tune(counted, path, (2 + 3 + 2) / 60, CPU))
    assert [rows for rows, _ in toy.timed] == [8, 8, 8, 64, 64]
    assert lines[-1] == "time is up: 1 settings are not tuned yet; run the same command to continue"
    assert [entry.key.shape for entry in tuning.read(path, tuning.header(CPU))] == [(8,)]
    list(search.tune(counted, path, 1, CPU))
    assert [entry.key.shape for entry in tuning.read(path, tuning.header(CPU))] == [(8,), (64,)]
    late = list(search.tune(counted, tmp_path / "other.json", 0, CPU))
    assert late[0] == "time is up before each call was timed once"


def test_rows_of_a_class_are_tuned_once(toy: Any, tmp_path: Path) -> None:
    counted = calls(toy.operator, *(torch.zeros(rows, 4) for rows in (33, 50, 50, 64, 65)))
    list(search.tune(counted, tmp_path / "table.json", 1, CPU))
    assert {rows for rows, _ in toy.timed} == {50, 65}


def test_somebody_elses_table_is_not_written_over(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text('{"gpu": "another", "entries": []}')
    with pytest.raises(ValueError, match="expected a table of gpu NVIDIA Z1 80GB, got another"):
        list(search.tune(calls(toy.operator, NARROW), path, 1, CPU))
    assert "another" in path.read_text()


def test_launched_kernels_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kernel: Any, *args: Any, **options: Any) -> Any:
        return args

    monkeypatch.setattr(JITFunction, "run", run)
    with search.launched() as kernels:
        linear._linear_fwd_kernel[(1,)](2, 3)
    linear._linear_fwd_kernel[(1,)](4)
    assert kernels == [(2, 3)] and JITFunction.run is run


def test_tensors_are_made_as_they_were() -> None:
    x, index = torch.zeros(5, 8, dtype=torch.float16).t()[:, 1:], torch.zeros(3, 2, dtype=torch.int64)
    call = search.Call(
        SimpleNamespace(_schema=SimpleNamespace(arguments=[SimpleNamespace(name=n) for n in "xitgs"])),
        tuple(map(search._frozen, (x, index, torch.zeros(4, 7), [2, 3], 0.5))),
    )
    made, places, _, groups, scale = call.make(CPU)
    assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
    assert 0 < made.float().std() < 0.1 and (groups, scale) == ([2, 3], 0.5)
    assert places.tolist() == [[0, 1], [2, 3], [0, 1]]  # rows of the four targets


@pytest.fixture
def places(toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Files of the package and of the user, for the GPU nobody has."""
    monkeypatch.setattr(tuning, "header", lambda device: HEAD)
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.table_of.cache_clear()
    yield tmp_path / "package" / "nvidia-z1-80gb.json", tuning.cache_file(HEAD["gpu"])
    tuning.table_of.cache_clear()


def entry(rows: int, number: int) -> Entry:
    return Entry(Key("toy", torch.float32, (rows,)), Toy(number), 1.0, 2.0, 3)


def test_a_users_entries_come_before_the_packages(places: tuple[Path, Path]) -> None:
    assert tuning.table_of(GPU) is None
    tuning.table_of.cache_clear()
    tuning.write(places[0], HEAD, [entry(8, 1), entry(16, 1)])
    tuning.write(places[1], HEAD, [entry(8, 5)])
    assert tuning.table_of(GPU) == {entry(8, 5).key: Toy(5), entry(16, 1).key: Toy(1)}
    assert tuning.table_of(CPU) is None
    chosen = tuning.TUNABLES["toy"].choose(SimpleNamespace(device=GPU, dtype=torch.float32), (8,), Toy(1))
    assert chosen == Toy(5)
    missing = Toy(1)
    assert (
        tuning.TUNABLES["toy"].choose(SimpleNamespace(device=GPU, dtype=torch.float16), (8,), missing)
        is missing
    )


GOOD = {
    **{"kernel": "toy", "dtype": "float32", "shape": [8], "settings": {"number": 5}},
    **{"us": 1.0, "fallback_us": 2.0, "samples": 3},
}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "JSONDecodeError"),
        ('{"gpu": "NVIDIA Z1 80GB", "torch": "1", "trit', "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'gpu'"),
        (json.dumps(HEAD), "KeyError: 'entries'"),
        (json.dumps(HEAD | {"triton": "3", "entries": []}), "expected a table of triton 2, got 3"),
        (json.dumps(HEAD | {"entries": [GOOD | {"kernel": "gone"}]}), "expected kernels toy, got gone"),
        (json.dumps(HEAD | {"entries": [GOOD | {"settings": {"number": 9}}]}), "float32 8: .*'number': 9"),
        (json.dumps(HEAD | {"entries": [GOOD | {"shape": [8, 8]}]}), "TypeError"),
        (json.dumps(HEAD | {"entries": [GOOD | {"dtype": "float3"}]}), "AttributeError"),
        (json.dumps(HEAD | {"entries": [{}]}), "TypeError"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_ignored_with_one_warning(
    places: tuple[Path, Path], content: str, complaint: str
) -> None:
    tuning.write(places[0], HEAD, [entry(16, 5)])
    places[1].parent.mkdir()
    places[1].write_text(content)
    with pytest.warns(UserWarning, match=f"{places[1]}: .*{complaint}") as caught:
        assert tuning.table_of(GPU) == {entry(16, 5).key: Toy(5)}
        tuning.table_of(GPU)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_every_fallback_can_stand_in_a_table() -> None:
    def candidates(kernel: str, *shape: int) -> list[Any]:
        return list(tuning.TUNABLES[kernel].candidates(*shape))

    for form in gemm._TUNABLES:
        for part in ((8, 0), (9, 0)):
            for columns in (384, 1024):
                assert gemm.gemm_config(form, columns, 2, part) in candidates(form, 64, columns, 128)
    for length in (1, 37, 128, 197, 256, 257, 600):
        for dim in (16, 64, 128):
            shape = (tuning.power_of_2(length), dim)
            for part in ((8, 0), (8, 9), (9, 0)):
                forward = candidates("attention_fwd", *shape)
                assert attention.fwd_config(length, dim, 2, part) in forward
                assert all(not c.resident or c.block_n >= length for c in forward)
                assert attention.bwd_config(length, dim, 2, part) in (
                    backward := candidates("attention_bwd", *shape)
                )
                assert all(not c.resident or c.block_n >= length for c in backward)
    for way in ("fwd", "bwd"):
        for config in layer_norm.CONFIGS:
            assert config in candidates(f"layer_norm_{way}", config.block)
        for per_group in (2, 3, 64):
            config = group_norm.group_config(32, per_group)
            assert config in candidates(f"group_norm_{way}", 64, 32, config.per_group)
        for part in ((8, 0), (9, 0)):
            config = prototypes.bwd_config(2, part) if way == "bwd" else prototypes.fwd_config(2, 256, part)
            assert config in candidates(f"losses_{way}", 64, 4096, 256)
        for side, part in itertools.product((4, 7), ((8, 0), (9, 0), (10, 0))):
            warps = window_attention.window_warps(side, 2, way == "bwd", part)
            shape = (window_attention.window_block(side), 32)
            assert window_attention.WindowConfig(warps) in candidates(f"window_attention_{way}", *shape)


def asked(preset: str, images: int | None, steps: str = "poa.memory:plan_preset") -> Namespace:
    return Namespace(preset=preset, images=images, steps=steps)


def test_the_calls_of_a_preset() -> None:
    calls = command._calls(asked("vit-s16", 2))
    names = {call.operator.__name__.removesuffix(".default") for call in calls}
    assert names >= {"linear_act_fwd", "linear_wgrad", "attention_bwd", "prototype_losses_fwd"}
    with pytest.raises(ValueError, match="expected one of quickstart.*got 'vit'"):
        command._calls(asked("vit", None))
    for steps in ("nowhere:f", "poa.memory:nothing", "poa.memory", ""):
        with pytest.raises(ValueError, match=f"--steps: expected MODULE:FUNCTION, got {steps}"):
            command._calls(asked("vit-s16", 2, steps))


def test_the_command(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time of planning counts; what is wrong with a table is one line."""
    given: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(command, "tune", lambda *arguments: given.append(arguments) or ["a line"])
    monkeypatch.setattr(command, "_calls", lambda *arguments: setattr(toy, "clock", 60) or Counter({1: 2}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["tune", "--preset", "vit-s16", "--minutes", "3"]) == 0
    path = tmp_path / "elastic_kernels" / "nvidia-z1-80gb.json"
    assert given == [(Counter({1: 2}), path, 2, GPU)]
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "relative")  # ignored
        assert tuning.cache_file("Z1").is_absolute()
    printed = capsys.readouterr().out
    assert printed == f"1 different calls in the steps of vit-s16; table: {path}\na line\n"

    monkeypatch.setattr(command, "tune", search.tune)
    path.parent.mkdir()
    path.write_text("{}")
    assert command.main(["tune", "--preset", "vit-s16", "--out", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"elastic_kernels: error: {path}: expected settings, got ")


@pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter compiles nothing")
def test_what_will_be_tried_is_compiled_beforehand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a GPU that is not here, every candidate once."""
    with absent_gpu("sm_90"), search.record() as calls:
        x, weight = (torch.empty(rows, 512, dtype=torch.float16, device="meta") for rows in (4096, 1024))
        elastic_linear(x, weight, activation="gelu")
    binaries: list[Binary] = []
    monkeypatch.setattr(
        Launches, "compile_into", lambda made, folder: binaries.extend(made.binaries) or ["one"]
    )
    monkeypatch.setattr(command, "_calls", lambda *arguments: calls)
    assert command.main(["tune", "--preset", "vit-s16", "--arch", "sm_90"]) == 0
    assert capsys.readouterr().out.endswith(
        "TRITON_CACHE_DIR=triton-cache python -m elastic_kernels tune --preset vit-s16\n"
    )
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "BESIDE", "num_warps", "num_stages", "maxnreg")
    settings = [(binary.constexprs | binary.options) for binary in binaries]
    compiled = [{name: options.get(name) for name in names} for options in settings]
    given = tuning.TUNABLES["gelu"].candidates(4096, 1024, 512)
    of_two = {1: None, 2: gemm.TWO_BLOCKS}  # registers, where persistent programs share a processor
    absent = [{"BESIDE": None, "maxnreg": of_two.get(c.persistent)} for c in given]
    asked = [others | gemm.launch_options(c) for others, c in zip(absent, given, strict=True)]
    wanted = [{name: options[name] for name in names} for options in asked]
    assert sorted(map(str, compiled)) == sorted(map(str, wanted))
    assert command.main(["tune", "--preset", "vit-s16", "--arch", "90"]) == 2
    assert "expected one of sm_80" in capsys.readouterr().err


def test_tiles_of_persistent_programs_are_as_high_as_those_in_their_place() -> None:
    """As the shape of sums over a tile's rows is known before it is known which of both are launched."""
    others = {
        gemm.gemm_config("dgrad_gelu", n, 2, gpu).block_m for n in (128, 4096) for gpu in [(8, 0), (9, 0)]
    }
    assert others == {config.block_m for config in gemm.PERSISTENT}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["tune", "--preset", "vit-l16"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "expected a GPU" in printed.err
