"""``QuantizedWeight``: the grid, its groups, the files it comes from, and its invariants."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant import QuantizedWeight, pack, packed_size
from lotaqaf_jax.quant.weight import group_count, trivial_g_idx

# (bits, in, out, group size, act-order): whole groups, one group, a partial last group with words that are not full.
GRIDS = (
    (2, 64, 16, 32, False),
    (3, 100, 32, 32, True),
    (4, 100, 8, 64, False),
    (4, 96, 8, -1, False),
    (8, 40, 8, 16, True),
)
FORMATS = ("gptq", "gptq_v2")


def random_arrays(
    rng: np.random.Generator, bits: int, n_in: int, n_out: int, group_size: int, act_order: bool
) -> dict[str, np.ndarray]:
    """Integers, zeros, scales and groups of a random weight, unpacked."""
    groups = group_count(n_in, group_size)
    g_idx = trivial_g_idx(n_in, group_size)
    return {
        "integers": rng.integers(0, 2**bits, (n_in, n_out)),
        "zeros": rng.integers(0, 2**bits, (groups, n_out)),
        "scales": rng.uniform(0.001, 0.1, (groups, n_out)).astype(np.float16),
        "g_idx": rng.permutation(g_idx) if act_order else g_idx,
    }


def build(
    arrays: dict[str, np.ndarray], bits: int, group_size: int, checkpoint_format: str = "gptq_v2"
) -> QuantizedWeight:
    """The same weight through the arrays of a GPTQ file."""
    words = pack(arrays["zeros"], bits, axis=-1)
    return QuantizedWeight.from_gptq(
        pack(arrays["integers"], bits, axis=0),
        words,
        arrays["scales"],
        arrays["g_idx"],
        bits=bits,
        group_size=group_size,
        checkpoint_format=checkpoint_format,
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_dequantize_is_scale_times_integer_minus_zero_plus_offset(
    grid: tuple[int, int, int, int, bool], seed: int
) -> None:
    bits, n_in, n_out, group_size, act_order = grid
    rng = np.random.default_rng(seed)
    arrays = random_arrays(rng, *grid)
    w = build(arrays, bits, group_size)
    assert (w.shape, w.groups, w.g_idx is None) == ((n_in, n_out), group_count(n_in, group_size), not act_order)

    g = arrays["g_idx"]
    steps = arrays["integers"].astype(np.float64) - arrays["zeros"][g]
    scales = arrays["scales"].astype(np.float64)[g]
    # s and q - z are short enough for their product to be exact in float32.
    np.testing.assert_array_equal(w.dequantize(), scales * steps)
    assert w.dequantize(jnp.bfloat16).dtype == jnp.bfloat16

    mu = rng.normal(size=arrays["zeros"].shape).astype(np.float32)
    shifted = dataclasses.replace(w, offset=jnp.asarray(mu))
    np.testing.assert_allclose(shifted.dequantize(), scales * (steps + mu[g]), rtol=2e-7, atol=1e-8)

    moved = np.clip(arrays["integers"] + rng.integers(-1, 2, (n_in, n_out)), 0, 2**bits - 1)
    np.testing.assert_array_equal(w.with_integers(moved).integers(), moved)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_groups_spread_and_sum(grid: tuple[int, int, int, int, bool], seed: int) -> None:
    """spread, group_sum and group_rows against loops; the sums are of integers, so exact in any order."""
    bits, n_in, n_out, group_size, _ = grid
    rng = np.random.default_rng(seed)
    arrays = random_arrays(rng, *grid)
    w = build(arrays, bits, group_size)
    g = arrays["g_idx"]
    per_group = rng.integers(-100, 100, (w.groups, n_out)).astype(np.float32)
    np.testing.assert_array_equal(w.spread(jnp.asarray(per_group)), per_group[g])
    per_row = rng.integers(-100, 100, (n_in, n_out)).astype(np.float32)
    expected = np.array([per_row[g == k].sum(axis=0) for k in range(w.groups)])
    np.testing.assert_array_equal(w.group_sum(jnp.asarray(per_row)), expected)
    np.testing.assert_array_equal(w.group_rows(), np.bincount(g, minlength=w.groups)[:, None])


def test_a_group_without_rows_can_be_divided_by() -> None:
    arrays = random_arrays(np.random.default_rng(0), 4, 64, 8, 32, False)
    arrays["g_idx"] = np.zeros(64, np.int32)
    np.testing.assert_array_equal(build(arrays, 4, 32).group_rows(), [[64], [1]])


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_file_survives_the_round_trip(grid: tuple[int, int, int, int, bool], checkpoint_format: str) -> None:
    """from_gptq then to_gptq gives every array as it was, whatever words the zeros hold."""
    bits, n_in, _, group_size, act_order = grid
    rng = np.random.default_rng(7)
    arrays = random_arrays(rng, *grid)
    n_out = 32  # zeros fill their words in every width, so that every stored bit means something
    groups = group_count(n_in, group_size)
    stored = {
        "qweight": np.asarray(pack(rng.integers(0, 2**bits, (n_in, n_out)), bits)),
        "qzeros": rng.integers(-(2**31), 2**31, (groups, packed_size(n_out, bits))).astype(np.int32),
        "scales": rng.uniform(0.001, 0.1, (groups, n_out)).astype(np.float16),
        "g_idx": arrays["g_idx"],
    }
    w = QuantizedWeight.from_gptq(**stored, bits=bits, group_size=group_size, checkpoint_format=checkpoint_format)
    written = w.to_gptq()
    assert set(written) == set(stored)
    for name, array in stored.items():
        assert written[name].dtype == array.dtype, name
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    if not act_order:
        without = QuantizedWeight.from_gptq(
            **(stored | {"g_idx": None}),
            bits=bits,
            group_size=group_size,
            checkpoint_format=checkpoint_format,
            in_features=n_in,
        )
        np.testing.assert_array_equal(without.dequantize(), w.dequantize())


def test_formats_differ_by_one_in_every_zero() -> None:
    arrays = random_arrays(np.random.default_rng(0), 4, 64, 8, 32, False)
    arrays["zeros"] = np.minimum(arrays["zeros"], 14)
    one, two = (build(arrays, 4, 32, kind) for kind in FORMATS)
    np.testing.assert_array_equal(one.zeros, two.zeros + 1)


def test_it_is_a_pytree_whose_sizes_are_part_of_the_structure() -> None:
    w = build(random_arrays(np.random.default_rng(0), 4, 64, 8, 32, False), 4, 32)
    assert [leaf.shape for leaf in jax.tree.leaves(w)] == [(8, 8), (2, 8), (2, 8)]
    back = jax.jit(lambda x: x)(w)
    assert (back.bits, back.group_size, back.shape, back.checkpoint_format) == (4, 32, (64, 8), "gptq_v2")
    assert jax.tree.structure(w) != jax.tree.structure(dataclasses.replace(w, group_size=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": np.zeros((9, 8), np.int32)}, r"proj\.qweight: found shape \(9, 8\), expected \(8, 8\)"),
        ({"qweight": np.zeros((8, 8), np.uint32)}, r"proj\.qweight: found uint32, expected int32"),
        ({"qzeros": np.zeros((3, 1), np.int32)}, r"proj\.qzeros: found shape \(3, 1\), expected \(2, 1\)"),
        ({"qzeros": np.zeros((2, 1), np.float32)}, r"proj\.qzeros: found float32, expected int32"),
        ({"scales": np.ones((1, 8), np.float16)}, r"proj\.scales: found shape \(1, 8\), expected \(2, 8\)"),
        ({"scales": np.ones((2, 8), np.int32)}, r"proj\.scales: found int32, expected a float type"),
        ({"scales": np.full((2, 8), np.nan, np.float16)}, r"proj\.scales: 16 of 16 values are NaN or infinite"),
        ({"g_idx": np.full(64, 2, np.int32)}, r"proj\.g_idx: values run from 2 to 2, expected groups 0 to 1"),
        ({"g_idx": np.full(64, -1, np.int32)}, r"proj\.g_idx: values run from -1 to -1, expected groups 0 to 1"),
        ({"g_idx": np.zeros(64, np.float32)}, r"proj\.g_idx: found float32, expected int32"),
    ],
)
def test_what_breaks_an_invariant_is_named(change: dict[str, np.ndarray], message: str) -> None:
    arrays = {
        "qweight": np.zeros((8, 8), np.int32),
        "qzeros": np.zeros((2, 1), np.int32),
        "scales": np.ones((2, 8), np.float16),
        "g_idx": trivial_g_idx(64, 32),
    }
    QuantizedWeight.from_gptq(**arrays, bits=4, group_size=32, name="proj")
    with pytest.raises(CheckpointError, match=message):
        QuantizedWeight.from_gptq(**(arrays | change), bits=4, group_size=32, name="proj")


def test_one_infinite_scale_is_found_at_its_place() -> None:
    scales = np.ones((2, 8), np.float16)
    scales[1, 3] = np.inf
    with pytest.raises(CheckpointError, match=r"1 of 16 values are NaN or infinite, the first at \(1, 3\)"):
        QuantizedWeight.from_gptq(np.zeros((8, 8), np.int32), np.zeros((2, 1), np.int32), scales, bits=4, group_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeros": jnp.full((2, 8), 16, jnp.uint8)}, r"w\.zeros: values up to 16, expected at most 15 for 4 bits"),
        ({"zeros": jnp.zeros((2, 8), jnp.int32)}, r"w\.zeros: found int32, expected uint8"),
        ({"offset": jnp.zeros((1, 8))}, r"w\.offset: found shape \(1, 8\), expected \(2, 8\)"),
        ({"offset": jnp.full((2, 8), jnp.nan)}, r"w\.offset: 16 of 16 values are NaN or infinite"),
    ],
)
def test_validate_looks_at_zeros_and_offset(change: dict[str, Any], message: str) -> None:
    w = build(random_arrays(np.random.default_rng(0), 4, 64, 8, 32, False), 4, 32)
    w.validate("w")
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(w, **change).validate("w")


def test_stacked_layers_are_validated_as_one() -> None:
    w = build(random_arrays(np.random.default_rng(0), 4, 64, 8, 32, True), 4, 32)
    stack = jax.tree.map(lambda x: jnp.stack([x, x, x]), w)
    stack.validate("w", stacked=1)
    with pytest.raises(CheckpointError, match="qweight: found shape"):
        stack.validate("w")


def test_unsupported_widths_and_formats_name_the_weight() -> None:
    arrays = (np.zeros((8, 8), np.int32), np.zeros((2, 1), np.int32), np.ones((2, 8), np.float16))
    with pytest.raises(ConfigError, match="proj: bits: 5 is not a supported width"):
        QuantizedWeight.from_gptq(*arrays, bits=5, group_size=32, name="proj")
    with pytest.raises(ConfigError, match="proj: checkpoint_format: 'gptq_p'"):
        QuantizedWeight.from_gptq(*arrays, bits=4, group_size=32, checkpoint_format="gptq_p", name="proj")


def test_the_room_is_useful_alone() -> None:
    """Packed weights need neither the models nor Flax."""
    code = (
        "import sys, lotaqaf_jax.quant, lotaqaf_jax.quant.folder, lotaqaf_jax.quant.config\n"
        "heavy = {'flax', 'torch', 'transformers', 'datasets', 'optax', 'lotaqaf_jax.models', 'lotaqaf_jax.ternary'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
