"""What options of commands share: parsers whose errors are one line, numbers, the weights of a run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from poa.errors import InputError
from poa.options import Interval, describe, shown

RUN_HELP = "run folder written by pretrain"


class Arguments(argparse.ArgumentParser):
    """Knows options that are numbers in an interval."""

    def add_number(
        self, flag: str, kind: Callable[[str], float], within: str, help: str, **options: Any
    ) -> None:
        """Add one, whose help ends with the default, if it has one."""
        default = " (default: %(default)s)" if "default" in options else ""
        self.add_argument(flag, type=number(kind, within), help=help + default, **options)


class Parser(Arguments):
    """Errors are raised, one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class Command(Parser):
    """The parser of a command, which takes no empty text."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.register("type", None, _not_empty)
        self.set_defaults(parser=self)

    @property
    def flags(self) -> list[str]:
        return list(self._option_string_actions)


def _not_empty(text: str) -> str:
    """As an unset variable of a script would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {text!r}")
    return text


def parse_anywhere(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Options, among which `KEY=VALUE` may stand anywhere where a command takes it; unknown words."""
    options, rest = parser.parse_known_args(arguments)
    takes = hasattr(options, "overrides")
    unknown = [word for word in rest if word.startswith("-") or not takes]
    if takes:
        options.overrides = [*options.overrides, *(word for word in rest if word not in unknown)]
    return options, unknown


def describe_commands(group: argparse._SubParsersAction[Command]) -> None:
    """Let the help of each command, where it has no other text, begin with its line in the list of all."""
    for action in group._choices_actions:
        command, text = group.choices[action.dest], str(action.help)
        command.description = command.description or f"{text[0].upper()}{text[1:]}."


def number(kind: Callable[[str], float], within: str) -> Callable[[str], float]:
    """A reader of an argument that is a number in an interval, for argparse."""
    interval = Interval.parse(within)

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value not in interval:
            raise argparse.ArgumentTypeError(f"expected a number in {within}, got {shown(text)!r}")
        return value

    return read


def values(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What options of these names got, as keyword arguments."""
    return {name: getattr(options, name) for name in names}


def add_subnets(command: Command, run: str = RUN_HELP, runs: str | None = None, **subnets: Any) -> None:
    """Which run, or `runs` of argparse's nargs, and which of its subnets; `subnets` tells whether they have a
    default."""
    command.add_argument("run", metavar="RUN", nargs=runs, help=run)
    command.add_argument(
        "--subnets",
        nargs="+",
        metavar="WxD",
        help="subnets as WIDTHxDEPTH, such as 384x12, or all",
        **subnets,
    )


def add_weights(command: Command) -> None:
    command.add_argument(
        "--branch",
        choices=("teacher", "student"),
        default="teacher",
        help="branch whose weights are used (default: teacher)",
    )
    add_step(command)


def add_threads(command: Command) -> None:
    command.add_number(
        "--threads",
        int,
        "[1, 1024]",
        "CPU threads of PyTorch (default: OMP_NUM_THREADS, or one on a CPU if that is not set)",
        metavar="N",
    )


def add_overrides(command: Arguments, help: str = "") -> None:
    help = help or "any option of a run, such as method.batch_size=32; poa pretrain --help lists them"
    command.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=help)


def described(options: Any, path: str = "") -> Iterator[str]:
    """Options in a help text: each with its value, kind and meaning."""
    for key, kind, value, text in describe(options, path):
        written = ",".join(map(str, value)) if isinstance(value, tuple) else value
        yield f"  {key}={written}\n      {kind}: {text}"


def add_step(command: Command) -> None:
    command.add_number("--step", int, "[1, 1e9]", "step of the checkpoint (default: the newest)", metavar="N")
