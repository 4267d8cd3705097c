"""Tables of the page docs/sweep.md, written between its marks so that they are always those of the results.

A mark is a line `<!-- traces -->`; what follows it, up to a line `<!-- end -->`, is replaced by the part's tables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def write(results: Mapping[str, Any], parts: Mapping[str, ModuleType], path: Path) -> None:
    """Replace the tables of every part that has results. Raises ValueError if the page lacks the marks of one."""
    text = path.read_text()
    for name, part in parts.items():
        if name not in results:
            continue
        body = "\n\n".join(markdown(table) for table in part.tables(results[name]))
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S)
        if found != 1:
            raise ValueError(f"{path} has {found} places `<!-- {name} -->` up to `<!-- end -->`, which must be one")
    path.write_text(text)


def markdown(table: Table) -> str:
    """The table in Markdown, its title above it in bold."""
    title, table.title, table.box, told = table.title, None, box.MARKDOWN, io.StringIO()
    for column in table.columns:
        column.header = str(column.header).replace("\n", " ")
    Console(file=told, width=10_000, color_system=None).print(table)
    rows = [re.sub(r" {2,}", " ", line).strip() for line in told.getvalue().splitlines() if line.strip()]
    rule = "|".join("---:" if column.justify == "right" else "---" for column in table.columns)
    return "\n".join([f"**{title}**", "", rows[0], f"|{rule}|", *rows[2:]])
