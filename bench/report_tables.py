"""What the parts of `bench.report` share: names, tables, what stands below a picture."""

from typing import Any

THREADS, RANK = 2, 16  # what tables and pictures show
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def markdown_table(heading: list[str], lines: list[list[str]], rule: str = "---:") -> str:
    """A markdown table, nothing without lines; `rule` is that of each column but the first, "---:"
    right, "---" left."""
    rules = ["---"] + [rule] * (len(heading) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, rules, *lines]) if lines else ""


def measured(stamp: dict[str, Any], more: str) -> str:
    """Where and with what a picture's data was measured."""
    return f"{stamp['processor']}, {stamp['level']}; torch {stamp['torch']}, peft {stamp['peft']}; {more}"


def select_rows(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def distinct(rows: list[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """The values of these keys, each combination once, in the order of the rows; rows without them
    are left out."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows if set(keys) <= set(row)))
