"""The map of the code, `MAP.md`: a line a file, the first of its docstring; `make map` writes it again."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = (ROOT / "poa", ROOT / "kernels" / "elastic_kernels", ROOT / "benchmarks")
HEAD = """# Map

Three floors: `benchmarks` uses `poa`, `poa` uses what `elastic_kernels` exports, never the other way.
Follow a step of training from `poa/train.py` to `poa/step.py` and `poa/tribranch.py`, an operator from
`kernels/elastic_kernels/linear.py` to `triton_ops/linear.py`. `make map` writes this page.
"""


def first_sentence(file: Path) -> str:
    """The first paragraph of a file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text, f"{file}: expected a docstring"
    return " ".join(text.partition("\n\n")[0].split())


def the_map() -> str:
    """The page, folder by folder."""
    lines = [HEAD]
    for folder in FOLDERS:
        for inner in sorted({file.parent for file in folder.rglob("*.py")}):
            lines.append(f"\n## {inner.relative_to(ROOT).as_posix()}/\n")
            lines += [f"- `{file.name}`: {first_sentence(file)}" for file in sorted(inner.glob("*.py"))]
    return "\n".join(lines) + "\n"


def test_the_map_is_that_of_the_code() -> None:
    assert (ROOT / "MAP.md").read_text(encoding="utf-8") == the_map(), "make map writes it again"


if __name__ == "__main__":
    (ROOT / "MAP.md").write_text(the_map(), encoding="utf-8")
