"""The tables of docs/scaling.md, by the calculator; no card is needed.

python scripts/scaling_tables.py                             prints them
python scripts/scaling_tables.py --write docs/scaling.md     puts them between the marks in that file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from lotaqaf_jax.plan import Plan
from lotaqaf_jax.plan.command import parser, planned
from lotaqaf_jax.plan.hardware import GIB

MODELS = {
    "llama-3.1-8b": "8B (Llama-3.1-8B, rank 64)",
    "qwen2.5-14b": "14B (Qwen2.5-14B, rank 64)",
    "qwen2.5-32b": "32B (Qwen2.5-32B, rank 32)",
    "llama-3.3-70b": "70B (Llama-3.3-70B, rank 32)",
    "llama-3.1-405b": "405B (Llama-3.1-405B, rank 32)",
}
CARDS = {"h100": "H100 80 GB", "h200": "H200", "a100-80": "A100 80 GB"}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
BEGIN, END = "<!-- tables: python scripts/scaling_tables.py --write docs/scaling.md -->", "<!-- end of tables -->"

HEADER = """\
| cards | data x fsdp x tensor | rows at once | recomputed | GiB a card | s a step | tokens/s | waiting |
|---|---|---|---|---|---|---|---|
"""


MEASURED = {"block": (18.6, 6094), "products": (47.3, 7206), "none": (100.0, None)}
"""docs/benchmarks.md: Qwen2.5-14B, 4 bit, group 64, rank 64, 8 x 1024 tokens, t-SignSGD, float8, one H200: the peak in
GiB and tokens a second by what is recomputed."""


def tables() -> str:
    """All of them, as Markdown."""
    return "\n".join([checked(), *(table(model) for model in MODELS)])


def checked() -> str:
    """The estimates beside what was measured."""
    flags = "--model qwen2.5-14b --gpu h200 --group_size 64 --batch 8 --optimizer t_signsgd"
    lines = ""
    for way, (peak, speed) in MEASURED.items():
        # Whether it fits does not matter: "none" is more than the share that the calculator leaves of a card.
        plan, _, _ = planned(parser().parse_args([*flags.split(), "--recompute", way]))
        needed, found = plan.memory.needed / GIB, plan.tokens_per_second
        cells = (way, f"{peak:g}", f"{needed:.1f} ({needed / peak - 1:+.0%})")
        times = ("", f"{found:,.0f}") if speed is None else (f"{speed:,}", f"{found:,.0f} ({found / speed - 1:+.0%})")
        lines += f"| {' | '.join((*cells, *times))} |\n"
    header = (
        "| recomputed | peak, GiB, measured | estimated | tokens/s, measured | estimated |\n|---|---|---|---|---|\n"
    )
    return f"### Checked\n\n    python -m lotaqaf_jax.plan {flags} --recompute block\n\n{header}{lines}"


def table(model: str) -> str:
    """One model on all cards."""
    lines = "".join(line for card in CARDS for line in rows(model, card))
    command = f"python -m lotaqaf_jax.plan --model {model} --gpu h100 --count 8"
    return f"### {MODELS[model]}\n\n    {command}    # and so on\n\n{HEADER}{lines}"


def rows(model: str, card: str) -> Iterator[str]:
    """Lines of a table; counts that do not fit are in one line, with what the largest of them lacks."""
    too_few: list[tuple[int, Plan]] = []
    for count in COUNTS:
        plan, fits, _ = planned(parser().parse_args(["--model", model, "--gpu", card, "--count", str(count)]))
        if not fits:
            too_few.append((count, plan))
            continue
        if too_few:
            yield refused(card, too_few)
            too_few = []
        yield fitted(card, count, plan)
    if too_few:
        yield refused(card, too_few)


def refused(card: str, plans: list[tuple[int, Plan]]) -> str:
    """The line of counts that do not fit."""
    counts = ", ".join(str(count) for count, _ in plans)
    plan = plans[-1][1]
    needed, limit = plan.memory.total / GIB, plan.limit / GIB
    return f"| {counts} x {CARDS[card]} | does not fit: {needed:.0f} GiB of {limit:.0f} | | | | | | |\n"


def fitted(card: str, count: int, plan: Plan) -> str:
    """The line of a count that fits."""
    layout, settings, seconds = plan.layout, plan.settings, plan.seconds
    cells = (
        f"{count} x {CARDS[card]}",
        f"{layout.data} x {layout.fsdp} x {layout.tensor}",
        f"{settings.batch}" if settings.accumulate == 1 else f"{settings.batch}, {settings.accumulate} times",
        "all but products" if settings.recompute == "products" else settings.recompute,
        f"{plan.memory.total / GIB:.0f}",
        f"{seconds.total:.3g}",
        f"{plan.tokens_per_second:,.0f}",
        f"{seconds.communication / seconds.total:.0%}" if count > 1 else "",
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Print or write."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--write", type=Path, help="a file with the marks")
    path = options.parse_args().write
    if path is None:
        print(tables())
        return
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        sys.exit(f"{path}: the marks {BEGIN!r} and {END!r} are missing; put them where the tables belong.")
    beside = path.with_suffix(".part")
    beside.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
