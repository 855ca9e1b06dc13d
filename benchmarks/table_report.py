"""From results to the table of docs/results.md and its plots."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from table_plan import BITS, ROWS, SOURCES, TASKS, Cell

__all__ = ["best_values", "write_report"]

Result = dict[str, Any]


def best_values(results: Iterable[Result]) -> dict[Cell, float]:
    """The tuned value with the best validation figure, which is the loss or the exact match."""
    found: dict[Cell, tuple[float, float, float]] = {}
    for result in results:
        if result["split"] == "validation":
            key = _cell(result, result["row"])
            loss, match = _loss(result, "after"), _match(result, "after") if TASKS[result["task"]].by_match else 0
            here = (-match, loss if math.isfinite(loss) else math.inf, result["value"])
            found[key] = min(found.get(key, here), here)
    return {key: value for key, (_, _, value) in found.items()}


def write_report(results: Sequence[Result], root: Path) -> None:
    """Write table.md, and a plot for each model and task."""
    best = best_values(results)
    tested = [result for result in results if result["split"] == "test" and _is_chosen(result, best)]
    parts = ["<!-- written by benchmarks/table.py -->\n"]
    for source in SOURCES.values():
        for task in source.tasks:
            here = [result for result in tested if (result["source"], result["task"]) == (source.name, task)]
            if not here:
                continue
            for title, value in _measures(task):
                parts.append(f"\n**{source.name}, {task}: {title}** (mean ± standard deviation of the seeds)\n\n")
                parts.append(_table(here, source.groups, value))
            if any(ROWS[result["row"]].ablation for result in here):
                title, value = _measures(task)[0]
                parts.append(f"\n**{source.name}, {task}: one change to the row without an offset** ({title})\n\n")
                parts.append(_table(here, source.groups, value, ablation=True))
            parts.append(f"\n{source.name}, {task}: what the runs came to\n\n{_details(here)}")
            _plot(here, source.name, task, source.groups[0], root / f"{source.name}_{task}.png")
    if best:
        parts.append("\nTuned on validation rows (LoRA, QA-LoRA: learning rate; LoTA-QAF: share to move): ")
        parts.append("; ".join(f"{' '.join(map(str, key))}: {value:g}" for key, value in sorted(best.items())) + "\n")
    (root / "table.md").write_text("".join(parts), encoding="utf-8")


def _cell(result: Result, row: str) -> Cell:
    return (result["source"], result["bits"], result["group_size"], result["task"], row)


def _is_chosen(result: Result, best: Mapping[Cell, float]) -> bool:
    """Whether it has the value that is the best by now; more values may have been tried since it was run."""
    key = _cell(result, ROWS[result["row"]].like or result["row"])
    return result["value"] is None or result["value"] == best.get(key, result["value"])


Value = Callable[[Result, str], float]


def _loss(result: Result, when: str) -> float:
    return result[when]["loss"]


def _match(result: Result, when: str) -> float:
    if when == "after" and "exact_match" in result:
        return 100 * result["exact_match"]["value"]
    return 100 * result[when]["exact_match"]


def _measures(task: str) -> list[tuple[str, Value]]:
    loss: tuple[str, Value] = ("held-out loss in nats per token", _loss)
    return [loss] if TASKS[task].rule is None else [("exact match in percent", _match), loss]


def _table(results: Sequence[Result], groups: Sequence[int], value: Value, *, ablation: bool = False) -> str:
    """Rows by columns of bits and groups: of the methods, or of the ablation beside what it starts from."""
    columns = [(bits, group_size) for group_size in groups for bits in BITS]
    lines = [["", *(f"{bits} bit, g{group_size}" for bits, group_size in columns)]]
    dense = [result for result in results if result["bits"] == 16]
    digits = 1 if value is _match else 4
    if not ablation:
        lines.append(["16 bit", *[_mean(dense, value, "before", digits)] * len(columns)])
    cells = collections.defaultdict(list)
    for result in results:
        cells[result["row"], result["bits"], result["group_size"]].append(result)
    first = [[r for (_, b, g), found in cells.items() if (b, g) == column for r in found] for column in columns]
    if not ablation:
        lines.append(["GPTQ", *(_mean(found[:1], value, "before", digits) for found in first)])
    for name, row in ROWS.items():
        if row.ablation != ablation and not (ablation and name == "none"):
            continue
        found = [cells[name, *((16, 0) if row.dense else column)] for column in columns]
        if any(found):
            lines.append([row.title, *(_mean(one, value, "after", digits) for one in found)])
    rule = ["---"] * len(lines[0])
    return "".join("| " + " | ".join(line) + " |\n" for line in [lines[0], rule, *lines[1:]])


def _mean(results: Sequence[Result], value: Value, when: str, digits: int) -> str:
    numbers = [value(result, when) for result in results]
    if not numbers:
        return ""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 or when == "before" else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def _details(results: Sequence[Result]) -> str:
    """Share moved, mean |mu|, time, size: medians over the seeds."""
    lines = [
        "| | bits | group | integers moved | mean abs mu | time | merged size | runs |\n",
        "|---" * 8 + "|\n",
    ]
    cells = collections.defaultdict(list)
    for result in results:
        cells[result["row"], result["bits"], result["group_size"]].append(result)
    for name, row in ROWS.items():
        for (other, bits, group_size), found in cells.items():
            if other != name:
                continue

            def middle(key: str, form: str, found: Sequence[Result] = found) -> str:
                numbers = [result[key] for result in found if result.get(key) is not None]
                return format(statistics.median(numbers), form) if numbers else ""

            size = middle("merged_bytes", ".0f")
            cellist = [
                row.title,
                str(bits),
                str(group_size or ""),
                middle("moved", ".2%"),
                middle("mean_abs_mu", ".3f"),
            ]
            cellist += [middle("seconds", ".0f") + " s", f"{int(size) / 1e6:.2f} MB" if size else "", str(len(found))]
            lines.append("| " + " | ".join(cellist) + " |\n")
    return "".join(lines)


def _plot(results: Sequence[Result], source: str, task: str, group_size: int, path: Path) -> None:
    """A panel for every width: every seed of every row, and their mean; rows that training made worse have no dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title, value = _measures(task)[0]
    here = [r for r in results if r["group_size"] == group_size and not ROWS[r["row"]].ablation]
    widths = [bits for bits in BITS if any(result["bits"] == bits for result in here)]
    names = [name for name in ROWS if any(result["row"] == name for result in here)]
    figure, panels = pyplot.subplots(
        1, len(widths), figsize=(2.2 + 2.4 * len(widths), 1.2 + 0.32 * len(names)), sharey=True, layout="constrained"
    )
    for bits, axes in zip(widths, panels if len(widths) > 1 else [panels], strict=True):
        for place, name in enumerate(names):
            found = [result for result in here if (result["bits"], result["row"]) == (bits, name)]
            before, after = ([value(result, when) for result in found] for when in ("before", "after"))
            if not after or (value is _loss and statistics.fmean(after) > max(before)):
                continue
            color = f"C{place}"
            axes.scatter(after, [place] * len(after), color=color, s=14)
            axes.plot([statistics.fmean(after)] * 2, [place - 0.3, place + 0.3], color=color)
        axes.set(title=f"{bits} bit")
        axes.grid(axis="x", alpha=0.3)
    first = panels[0] if len(widths) > 1 else panels
    first.set_yticks(range(len(names)), [ROWS[name].title for name in names])
    first.invert_yaxis()
    figure.supxlabel(f"{source}, {task}, group {group_size}: {title}", fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
