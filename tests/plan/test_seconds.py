"""Time: near the steps and the profile that were measured, and in the right order where nothing was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.models import preset
from lotaqaf_jax.plan import GPUS, Layout, Seconds, Settings, Shape, gpu, seconds_of, shape_of
from lotaqaf_jax.plan.seconds import LINK_SHARE, _Ring
from tests.plan.test_memory import all_layouts, all_settings, numbers, shapes

BENCHMARKED = shape_of(preset("qwen2.5-14b"), 4, 64)
LLAMA_8B = shape_of(preset("llama-3.1-8b"))
SETTINGS = Settings(optimizer="t_signsgd")
cards = st.sampled_from(list(GPUS.values()))


def profiled(**changes: Any) -> Seconds:
    return seconds_of(BENCHMARKED, gpu("h200"), dataclasses.replace(SETTINGS, **changes))


# docs/benchmarks.md: tokens a second of 8 x 1024 tokens, with float8.
@pytest.mark.parametrize(("recompute", "tokens"), [("block", 6094), ("products", 7206)])
def test_steps_take_about_as_long_as_measured(recompute: Any, tokens: int) -> None:
    assert 8192 / profiled(recompute=recompute).total == pytest.approx(tokens, rel=0.15)


def test_parts_of_a_step_are_about_those_of_the_profile() -> None:
    """docs/benchmarks.md, "What bounds it": seconds by kind of kernel, "products"."""
    found = profiled(recompute="products")
    rounding_and_adapters, copies_and_elementwise, products = 0.041 + 0.023, 0.042 + 0.087, 0.81
    # The profile has the head's products among the products, and the logits among the elementwise work.
    assert found.forward + found.backward + found.loss == pytest.approx(products, rel=0.15)
    assert found.attention == pytest.approx(0.063, rel=0.15)
    assert found.weights == pytest.approx(0.038, rel=0.15)
    assert found.gradients == pytest.approx(rounding_and_adapters, rel=0.15)
    assert found.elementwise == pytest.approx(copies_and_elementwise, rel=0.15)


def test_without_float8_a_step_is_slower_by_what_was_measured() -> None:
    """5,703 tokens/s, less the 0.19 s of products that were computed twice then (docs/benchmarks.md)."""
    assert profiled(recompute="products", float8=False).total == pytest.approx(8192 / 5703 - 0.19, rel=0.15)


def test_forward_products_are_two_operations_a_weight_and_token() -> None:
    weights = sum(
        n_in * n_out for n_in, n_out in ((4096, 4096), (4096, 4096), *[(4096, 1024)] * 2, *[(4096, 14336)] * 3)
    )
    found = seconds_of(LLAMA_8B, gpu("h100"), Settings())
    assert found.forward == pytest.approx(2 * 8192 * 32 * weights / (0.71 * 989e12))
    assert found.again / found.forward == pytest.approx(1 - 4096 * 14336 / weights)
    assert found.communication == 0


def test_a_card_without_float8_takes_twice_as_long_for_the_weights_gradients() -> None:
    half = dataclasses.replace(gpu("h200"), flops8=None)
    with_float8, without = (seconds_of(LLAMA_8B, card, Settings()) for card in (gpu("h200"), half))
    assert without.backward / with_float8.backward == pytest.approx(2 / 1.5, rel=0.01)
    assert without.gradients < with_float8.gradients  # nothing is rounded


def test_the_baselines_have_no_weights_gradients() -> None:
    lota = seconds_of(LLAMA_8B, gpu("a100-80"), Settings())
    lora = seconds_of(LLAMA_8B, gpu("a100-80"), Settings(method="lora", optimizer="adamw"))
    assert lora.gradients == 0
    assert lora.backward < 0.6 * lota.backward
    assert lora.forward > lota.forward  # its product stands beside the weight's


@given(shapes, cards, all_settings, all_layouts, st.sampled_from(["batch", "length", "rank", "accumulate"]))
def test_more_work_never_takes_less_time(shape: Shape, card: Any, settings: Any, layout: Layout, name: str) -> None:
    more = dataclasses.replace(settings, **{name: 2 * getattr(settings, name)})
    assert seconds_of(shape, card, more, layout).total >= seconds_of(shape, card, settings, layout).total


@given(shapes, cards, all_settings, all_layouts)
def test_devices_wait_only_for_others(shape: Shape, card: Any, settings: Any, layout: Layout) -> None:
    found = seconds_of(shape, card, settings, layout)
    assert (found.communication > 0) == (layout.count > 1)
    assert found.total == pytest.approx(sum(taken for _, taken in found.parts()))


@given(shapes, cards, all_settings)
def test_tensor_divides_products_and_attention(shape: Shape, card: Any, settings: Any) -> None:
    """To within a weight that is read in no less time than it is multiplied."""
    one, two = (seconds_of(shape, card, settings, Layout(tensor=t)) for t in (1, 2))
    for name in ("forward", "backward", "attention", "weights"):
        assert getattr(two, name) == pytest.approx(getattr(one, name) / 2, rel=1e-6)


def test_a_ring_over_hosts_sends_through_the_adapters_of_its_members() -> None:
    card = gpu("h100")
    within, over, thin = (_Ring(card, *sides).bandwidth for sides in ((8, 1), (16, 1), (2, 8)))
    assert within == LINK_SHARE * card.link
    assert over == LINK_SHARE * min(card.link, 8 * card.network)
    assert thin == LINK_SHARE * card.network


@given(st.integers(2, 64), numbers)
def test_a_sum_takes_twice_what_a_gathering_takes(size: int, mib: int) -> None:
    ring = _Ring(gpu("h200"), size, 1)
    assert ring.add(mib * 2.0**20) == 2 * ring.gather(mib * 2.0**20)
    assert ring.gather(mib * 2.0**20) >= (size - 1) / size * mib * 2**20 / ring.bandwidth
