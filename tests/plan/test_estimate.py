"""Plans: the fastest that fits, and the nearest that would."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import preset
from lotaqaf_jax.plan import (
    Layout,
    Settings,
    Shape,
    Space,
    estimate,
    fastest,
    fitting,
    gpu,
    gpu_of_kind,
    layouts,
    memory_of,
    shape_of,
)
from lotaqaf_jax.plan.estimate import CLOSE
from tests.plan.test_memory import all_layouts, all_settings, shapes

GIB = 2**30
LLAMA_70B = shape_of(preset("llama-3.3-70b"))
LLAMA_405B = shape_of(preset("llama-3.1-405b"))
LARGE = Settings(rank=32)


def test_70b_trains_on_one_card_of_80_gb() -> None:
    for name in ("h100", "a100-80"):
        plan, fits = fastest(LLAMA_70B, gpu(name), 1, LARGE, rows=64)
        assert fits
        assert plan.rows == 64
        assert plan.memory.held.total > 40 * GIB


def test_405b_takes_several() -> None:
    fit = {count: fastest(LLAMA_405B, gpu("h200"), count, LARGE, rows=64)[1] for count in (1, 2, 4)}
    assert fit == {1: False, 2: False, 4: True}


def test_the_fastest_is_the_leanest_of_all_that_are_as_fast() -> None:
    plan, fits = fastest(LLAMA_70B, gpu("h100"), 4, LARGE, rows=16)
    assert fits
    found = []
    for layout in layouts(LLAMA_70B, gpu("h100"), 4):
        for batch in (1, 2, 4, 8):
            for way in ("products", "block"):
                if 16 % (batch * layout.replicas) == 0:
                    accumulate = 16 // (batch * layout.replicas)
                    tried = dataclasses.replace(LARGE, batch=batch, accumulate=accumulate, recompute=way)
                    found.append(estimate(LLAMA_70B, gpu("h100"), tried, layout))
    fast = max(one.tokens_per_second for one in found if one.fits)
    as_fast = [one for one in found if one.fits and one.tokens_per_second >= (1 - CLOSE) * fast]
    assert plan == min(as_fast, key=lambda one: (one.layout.tensor, one.memory.total))


def test_what_is_given_is_kept() -> None:
    space = Space(batches=(2,), recomputes=("none",), fsdp=2)
    plan, _ = fastest(LLAMA_70B, gpu("b200"), 4, LARGE, rows=64, space=space)
    assert (plan.settings.batch, plan.settings.recompute, plan.layout.fsdp, plan.rows) == (2, "none", 2, 64)


def test_where_nothing_fits_the_leanest_is_told() -> None:
    plan, fits = fastest(LLAMA_405B, gpu("h100"), 1, LARGE, rows=64)
    assert not fits
    assert (plan.settings.batch, plan.settings.recompute) == (1, "block")


def test_layouts_are_all_ways_to_make_the_count() -> None:
    found = list(layouts(LLAMA_70B, gpu("h100"), 64))
    assert all(layout.count == 64 and layout.tensor <= 8 for layout in found)
    assert len(found) == len(set(found)) == 7 + 6 + 5 + 4
    with pytest.raises(
        ConfigError, match=r"--count: found 4, expected data \* fsdp \* tensor, which are any \* any \* 8"
    ):
        list(layouts(LLAMA_70B, gpu("h100"), 4, Space(tensor=8)))
    with pytest.raises(ConfigError, match="--tensor_parallel: found 16, expected a divisor of the model's 8 key"):
        list(layouts(LLAMA_70B, gpu("h100"), 16, Space(tensor=16)))


@given(shapes, all_settings, all_layouts, st.floats(2, 100))
def test_what_is_said_to_fit_fits_and_keeps_the_update(
    shape: Shape, settings: Settings, layout: Layout, gib: float
) -> None:
    fit = fitting(shape, settings, layout, gib * GIB)
    if fit is None:
        return
    assert memory_of(shape, fit.settings, fit.layout).total <= gib * GIB
    assert fit.layout.count == layout.count
    rows = [s.batch * s.accumulate * where.replicas for s, where in ((settings, layout), (fit.settings, fit.layout))]
    assert rows[0] == rows[1]
    whole = dataclasses.asdict(fit.settings) | dataclasses.asdict(fit.layout)
    assert whole == dataclasses.asdict(settings) | dataclasses.asdict(layout) | dict(fit.changes)


def test_what_costs_least_is_given_up_first() -> None:
    settings = Settings(rank=64, recompute="products")
    orders = []
    for eighths in range(640, 64, -1):
        fit = fitting(shape_of(preset("qwen2.5-14b"), 4, 64), settings, Layout(), eighths * GIB / 8)
        orders.append([] if fit is None else [name for name, _ in fit.changes])
    seen = [names for i, names in enumerate(orders) if names and names not in orders[:i]]
    assert seen == [
        ["recompute"],
        ["batch", "accumulate", "recompute"],
        ["batch", "accumulate", "rank", "recompute"],
        ["batch", "length", "accumulate", "rank", "recompute"],
    ]
    assert orders[0] == []
    assert orders[-1] == []  # too small for anything


def test_weights_are_split_before_the_rank_is_halved() -> None:
    limit = 80 * GIB
    settings = Settings(rank=32, batch=1, accumulate=8)
    fit = fitting(LLAMA_405B, settings, Layout(data=8), limit)
    assert fit is not None
    assert dict(fit.changes).keys() == {"data", "fsdp"}


def test_numbers_of_a_plan() -> None:
    plan = estimate(LLAMA_70B, gpu("h200"), dataclasses.replace(LARGE, accumulate=2), Layout(data=2))
    assert plan.rows == 32
    assert plan.tokens_per_second == pytest.approx(32 * 1024 / plan.seconds.total)
    assert plan.steps_per_day * plan.seconds.total == pytest.approx(86400)
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["memory_bytes"]["total"] == plan.memory.total
    assert told["seconds"]["total"] == plan.seconds.total
    assert not told["measured_card"]  # what passes between two was not


def test_cards_are_found_by_name_and_by_what_jax_calls_them() -> None:
    assert gpu("H200") is gpu("h200")
    for kind, name in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ):
        assert gpu_of_kind(kind) is gpu(name)
    assert gpu_of_kind("TPU v4") is None
    with pytest.raises(ConfigError, match=r"--gpu: found 'a100', expected one of: a100-40, a100-80, h100, h200, b200"):
        gpu("a100")
    with pytest.raises(ConfigError, match=r"--memory_fraction: found 1\.5, expected 0 < memory_fraction <= 1"):
        estimate(LLAMA_70B, gpu("h200"), LARGE, memory_fraction=1.5)
