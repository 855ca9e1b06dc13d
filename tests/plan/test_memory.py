"""Bytes: what is held and what is kept equal the arrays that JAX has; peaks are near those that were measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import (
    Decoder,
    DecoderConfig,
    QuantSpec,
    adapted_linears,
    add_adapters,
    add_lora,
    add_qalora,
    dense_spec,
    linears,
    preset,
)
from lotaqaf_jax.optim import t_signsgd, ternary_adam
from lotaqaf_jax.plan import Layout, Settings, Shape, held_bytes, memory_of, saved_bytes, shape_of
from lotaqaf_jax.plan.memory import LOSS_VALUES, RESERVE
from lotaqaf_jax.training import loss
from lotaqaf_jax.training.adamw import adamw
from lotaqaf_jax.training.compilation import least_recompute
from lotaqaf_jax.training.step import split_model
from tests.models.tiny import CONFIG, quantized_decoder

GIB = 2**30
LLAMA_8B = preset("llama-3.1-8b")
MIXED = dataclasses.replace(CONFIG, tie_word_embeddings=False, num_hidden_layers=2)

Adapt = Callable[[Decoder], Decoder]
ADAPT: dict[str, Callable[[int], Adapt]] = {
    "lota": lambda rank: lambda model: add_adapters(model, rank, 1.0),
    "lora": lambda rank: lambda model: add_lora(model, rank, 2.0 * rank),
    "qalora": lambda rank: lambda model: add_qalora(model, rank, 2.0 * rank),
}


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def arrays(tree: Any) -> Any:
    """The leaves that are no single numbers, such as counters."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]


def mixed_spec(config: DecoderConfig) -> Any:
    """Layers that are quantised differently, one projection in 16 bit, and a head in packed words."""
    wide = dense_spec(config, jnp.float16, QuantSpec(8, 16, act_order=True))
    narrow = dense_spec(config, jnp.bfloat16, QuantSpec(3, -1)).layers[0]
    narrow = tuple(
        (path, dataclasses.replace(linear, quant=None) if path == "mlp.up_proj" else linear) for path, linear in narrow
    )
    assert wide.head is not None
    head = dataclasses.replace(wide.head, quant=QuantSpec(4, 16))
    return dataclasses.replace(wide, layers=(wide.layers[0], narrow), head=head)


SHAPES = {
    "tied, 4 bit": Shape(CONFIG, dense_spec(CONFIG, jnp.float16, QuantSpec(4, 16))),
    "3 bit, a last word that is not full": Shape(CONFIG, dense_spec(CONFIG, jnp.bfloat16, QuantSpec(3, 20))),
    "mixed": Shape(MIXED, mixed_spec(MIXED)),
    "8B": shape_of(LLAMA_8B, 4, 128),
}


@pytest.mark.parametrize("method", ADAPT)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_held_equals_the_arrays_of_the_model(name: str, method: Any) -> None:
    shape = SHAPES[name]
    model = nnx.eval_shape(lambda: ADAPT[method](4)(Decoder(shape.config, shape.spec, jnp.bfloat16)))
    held = held_bytes(shape, Settings(rank=4, method=method, optimizer="adamw" if method != "lota" else "t_signsgd"))
    _, adapters, frozen = split_model(model)
    thresholds = 4 * sum(len(names) for names, _, _ in adapted_linears(model)) if method == "lota" else 0
    assert held.adapters == nbytes(adapters) + thresholds
    assert held.total - held.adapters - held.optimizer == nbytes(frozen) - thresholds


def test_what_is_held_equals_a_model_in_memory() -> None:
    model = add_adapters(quantized_decoder(), 4, 1.0)
    held = held_bytes(SHAPES["tied, 4 bit"], Settings(rank=4, optimizer="t_signsgd"))
    assert held.total == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert held.words == sum(linear.packed.qweight.nbytes for _, linear in linears(model))


def test_a_dense_base_under_lora_is_counted_in_16_bit() -> None:
    shape = shape_of(CONFIG, 16, stored=jnp.bfloat16)
    model = nnx.eval_shape(lambda: add_lora(Decoder(CONFIG, shape.spec, jnp.bfloat16), 4, 8.0))
    held = held_bytes(shape, Settings(rank=4, method="lora", optimizer="adamw"))
    assert held.words == 0
    assert held.total - held.optimizer == nbytes(nnx.state(model))


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        (Settings(optimizer="ternary_adam"), ternary_adam(0.1)),
        (Settings(optimizer="t_signsgd"), t_signsgd(10)),
        (Settings(optimizer="t_signsgd", beta=True), t_signsgd(10, beta=0.9)),
        (Settings(method="lora", optimizer="adamw"), adamw(lambda count: 1e-3)),
    ],
    ids=["ternary_adam", "t_signsgd", "averaged", "adamw"],
)
def test_the_optimizers_state_is_as_large_as_it_says(settings: Settings, optimizer: Any) -> None:
    model = nnx.eval_shape(lambda: ADAPT[settings.method](64)(Decoder(LLAMA_8B, SHAPES["8B"].spec, jnp.bfloat16)))
    state = jax.eval_shape(optimizer.init, split_model(model)[1])
    assert held_bytes(SHAPES["8B"], settings).optimizer == nbytes(arrays(state))


@pytest.mark.parametrize("recompute", ["block", "products", "none"])
def test_what_is_kept_for_the_backward_pass_is_what_jax_keeps(recompute: Any) -> None:
    batch, length = 5, 12
    settings = Settings(batch=batch, length=length, rank=4, recompute=recompute)

    def kept() -> Any:
        model = add_adapters(Decoder(CONFIG, SHAPES["tied, 4 bit"].spec, jnp.bfloat16), 4, 1.0)
        graph, adapters, frozen = split_model(model)
        floats = jax.tree.map(lambda array: array.astype(jnp.float32), adapters)
        ids = jnp.zeros((batch, length), jnp.int32)
        return jax.vjp(lambda a: nnx.merge(graph, a, frozen).hidden_states(ids, recompute=recompute), floats)[1]

    # The scores of plain attention are left out: on a card, cuDNN keeps none. So are what is a number a token or head.
    of_tokens = [
        leaf
        for leaf in jax.tree.leaves(jax.eval_shape(kept))
        if leaf.shape[:3] == (CONFIG.num_hidden_layers, batch, length) and math.prod(leaf.shape[3:]) >= 16
    ]
    assert saved_bytes(SHAPES["tied, 4 bit"], settings) == nbytes(of_tokens)


# docs/benchmarks.md: Qwen2.5-14B, 4 bit, group 64, rank 64, 8 x 1024 tokens, t-SignSGD, an H200; peaks in GiB.
MEASURED = {"block": 18.6, "products": 47.3, "none": 100.0}


@pytest.mark.parametrize("recompute", MEASURED)
def test_peaks_are_near_those_that_were_measured(recompute: Any) -> None:
    shape = shape_of(preset("qwen2.5-14b"), 4, 64, jnp.bfloat16)
    memory = memory_of(shape, Settings(recompute=recompute, optimizer="t_signsgd"))
    assert memory.needed / GIB == pytest.approx(MEASURED[recompute], rel=0.15)
    assert memory.peak.name == "backward"


def test_parts_sum_up_and_leave_the_reserve() -> None:
    memory = memory_of(SHAPES["8B"], Settings())
    assert sum(size for _, size in memory.parts()) == memory.total
    assert memory.reserve == pytest.approx(RESERVE * memory.total, rel=1e-6)


def test_numbers_taken_from_training_are_training_s() -> None:
    assert loss._CHUNK_VALUES == LOSS_VALUES
    assert least_recompute.__kwdefaults__ == {"share": 1 - RESERVE}


numbers = st.integers(1, 64)
ways = st.sampled_from(["block", "products", "none"])
all_settings = st.builds(
    Settings,
    batch=numbers,
    length=numbers.map(lambda n: 32 * n),
    accumulate=st.integers(1, 3),
    rank=numbers,
    recompute=ways,
    optimizer=st.sampled_from(["ternary_adam", "t_signsgd"]),
    packing=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)
shapes = st.sampled_from([shape_of(preset(name), 4, 128) for name in ("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-32b")])
all_layouts = st.builds(
    Layout, data=st.sampled_from([1, 2]), fsdp=st.sampled_from([1, 2, 8]), tensor=st.sampled_from([1, 2, 4])
)


@given(shapes, all_settings, all_layouts, st.sampled_from(["batch", "length", "rank"]))
def test_more_rows_tokens_or_rank_never_take_less(shape: Shape, settings: Settings, layout: Layout, name: str) -> None:
    more = dataclasses.replace(settings, **{name: 2 * getattr(settings, name)})
    assert memory_of(shape, more, layout).needed >= memory_of(shape, settings, layout).needed


@given(shapes, all_settings, all_layouts)
def test_to_recompute_more_keeps_less(shape: Shape, settings: Settings, layout: Layout) -> None:
    kept = [
        saved_bytes(shape, dataclasses.replace(settings, recompute=way), layout)
        for way in ("block", "products", "none")  # type: ignore[arg-type]
    ]
    assert kept == sorted(kept)


@given(shapes, all_settings, all_layouts, st.sampled_from(["fsdp", "tensor"]))
def test_a_device_of_more_holds_less_and_works_with_no_more(
    shape: Shape, settings: Settings, layout: Layout, name: str
) -> None:
    """Of the same rows. What fsdp gathers for use is at most the head, beside a layer that is sliced out anyway."""
    split = dataclasses.replace(layout, **{name: 2 * getattr(layout, name)})
    assert held_bytes(shape, settings, split).total < held_bytes(shape, settings, layout).total
    gathered = 2 * shape.config.vocab_size * shape.config.hidden_size if name == "fsdp" and layout.fsdp == 1 else 0
    assert memory_of(shape, settings, split).needed <= memory_of(shape, settings, layout).needed + gathered


@given(st.integers(1, 8), st.integers(1, 8))
def test_parts_of_all_devices_make_up_the_whole(fsdp: int, tensor: int) -> None:
    """Sizes that divide: what each holds, times the devices, is what one would hold, but for norms."""
    fsdp, tensor = 2 ** (fsdp % 4), 2 ** (tensor % 4)
    one, part = (held_bytes(SHAPES["8B"], Settings(), layout) for layout in (Layout(), Layout(1, fsdp, tensor)))
    for name in ("words", "scales", "zeros", "embeddings"):
        assert getattr(part, name) * fsdp * tensor == getattr(one, name)
    assert part.dense == one.dense


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        (
            SHAPES["8B"],
            Layout(fsdp=3),
            "--fsdp: the 4096 outputs of self_attn.q_proj are not split evenly over 3 cards",
        ),
        (
            shape_of(preset("qwen2.5-1.5b")),
            Layout(tensor=4),
            "--tensor_parallel: found 4, expected a divisor of the model's 2 key/value heads",
        ),
        (
            shape_of(preset("qwen2.5-14b")),
            Layout(tensor=8),
            "--tensor_parallel: 8 parts of the 13824 inputs of mlp.down_proj are not whole",
        ),
        (SHAPES["mixed"], Layout(tensor=2), "--tensor_parallel: the groups of self_attn.o_proj lie in no order"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused(shape: Shape, layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_of(shape, Settings(), layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(rank=0), "--rank: found 0, expected 1 or more"),
        (lambda: Settings(target_modules=("q",)), "target_modules: q not known"),
        (lambda: Layout(fsdp=0), "--fsdp: found 0, expected 1 or more"),
        (lambda: shape_of(CONFIG, 5), "--bits"),
        (lambda: shape_of(CONFIG, 4, 0), "--group_size: found 0, expected 1 or more, or -1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
