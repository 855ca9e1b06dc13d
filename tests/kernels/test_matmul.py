"""The packed matmul: every implementation gives the products of float64, for every layout a checkpoint can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.matmul import packed_matmul, packed_matmul_many
from lotaqaf_jax.kernels.matmul.blocks import FewRows, ManyRows, bucket_of, matmul_blocks, period_of
from lotaqaf_jax.quant import QuantizedWeight
from tests.kernels.implementations import IMPLEMENTATIONS, cases
from tests.weights import Grid, quantized, random_numbers

product = jax.jit(packed_matmul, static_argnames="implementation")
products = jax.jit(packed_matmul_many, static_argnames="implementation")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight, its float64 twin (in, out), and a bias."""

    w: QuantizedWeight
    matrix: np.ndarray
    bias: jax.Array

    @classmethod
    def random(cls, seed: int, grid: Grid, offset: Any = None, scales: Any = jnp.float16) -> Case:
        rng = np.random.default_rng(seed)
        numbers = random_numbers(rng, grid)
        w = quantized(numbers, grid)
        w = dataclasses.replace(w, scales=jnp.asarray(numbers["scales"], scales))
        if offset is not None:
            mu = rng.uniform(-0.5, 0.5, (grid.groups, grid.n_out))
            w = dataclasses.replace(w, offset=jnp.asarray(mu, offset))
        steps = numbers["integers"] - numbers["zeros"][numbers["g_idx"]].astype(np.float64)
        if w.offset is not None:
            steps += np.asarray(w.offset, np.float64)[numbers["g_idx"]]
        matrix = np.asarray(w.scales, np.float64)[numbers["g_idx"]] * steps
        return cls(w, matrix, jnp.asarray(rng.normal(size=grid.n_out), jnp.float32))


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one form as a stack of layers."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *weights)


def rows_of(seed: int, *shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def error(y: jax.Array, truth: np.ndarray) -> float:
    """Largest deviation, in units of the typical output."""
    return float(np.abs(np.asarray(y, np.float64) - truth).max() / np.sqrt(np.mean(truth**2)))


# Products, their sums with a bias and, with an offset, q - z + mu are rounded to the type of x. Triton's interpreter
# cuts float32 off to bfloat16 where a card rounds, so bfloat16 is held loosely here, tightly by benchmarks/matmul.py.
TOLERANCE = {jnp.float32: 3e-6, jnp.float16: 4e-3, jnp.bfloat16: 6e-2}

# (grid, rows, type of x, type of the offset, type of the scales)
CASES = (
    (Grid(4, 256, 64, 64), 1, jnp.float32, None, jnp.float16),
    (Grid(4, 256, 64, 64), 3, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    (Grid(4, 512, 40, 128), 8, jnp.float16, jnp.float16, jnp.float32),  # a longer round
    (Grid(4, 200, 41, 32), 9, jnp.float16, None, jnp.float16),  # neither axis is whole; two rows of eight
    (Grid(4, 300, 33, 96), 2, jnp.float16, jnp.float32, jnp.float16),  # rounds move on by no whole number of groups
    (Grid(4, 130, 33, -1), 20, jnp.float32, None, jnp.float16),  # one group, last word not full
    (Grid(2, 200, 41, 32), 2, jnp.float16, None, jnp.float16),  # two groups in a step
    (Grid(2, 320, 41, 64), 2, jnp.bfloat16, jnp.float16, jnp.float16),
    (Grid(3, 400, 41, 32), 2, jnp.float16, jnp.float16, jnp.float16),  # four groups in a step
    (Grid(3, 200, 41, 64), 1, jnp.float32, None, jnp.float16),  # two
    (Grid(3, 150, 41, 128), 1, jnp.float32, None, jnp.float16),  # one
    (Grid(8, 400, 41, 64), 5, jnp.float16, jnp.float16, jnp.float16),
    (Grid(8, 90, 33, 32), 33, jnp.float32, None, jnp.float16),  # 33 rows of 64
    (Grid(8, 90, 33, -1), 2, jnp.bfloat16, jnp.float32, jnp.float16),
    # More than 8 rows.
    (Grid(4, 512, 256, 64), 16, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),  # even, k shared between programs
    (Grid(4, 576, 128, 64), 100, jnp.float16, jnp.float32, jnp.float16),  # rounds that programs do not share evenly
    (Grid(2, 320, 41, 32), 16, jnp.bfloat16, None, jnp.float16),  # two groups in a step
    (Grid(3, 400, 41, 32), 33, jnp.float16, jnp.float16, jnp.float16),  # four
    (Grid(3, 400, 128, 64), 9, jnp.float32, None, jnp.float16),  # two, and three terms of x
    (Grid(2, 200, 41, -1), 40, jnp.float16, jnp.float16, jnp.float32),
    (Grid(8, 256, 128, 128), 64, jnp.bfloat16, jnp.float16, jnp.float16),
    # Not in one kernel: act-order, groups that are no periods, float32 with an offset, many rows.
    (Grid(4, 128, 33, 32, act_order=True), 2, jnp.float32, jnp.float16, jnp.float16),
    (Grid(4, 100, 33, 20), 2, jnp.float32, None, jnp.float16),
    (Grid(4, 128, 33, 32), 2, jnp.float32, jnp.float32, jnp.float16),
    (Grid(4, 128, 33, 32), 129, jnp.float16, None, jnp.float16),
)


@pytest.mark.parametrize(("grid", "rows", "dtype", "offset", "scales"), CASES, ids=lambda value: str(value)[:30])
def test_the_product_is_that_of_float64(
    implementation: str, grid: Grid, rows: int, dtype: Any, offset: Any, scales: Any
) -> None:
    case = Case.random(rows, grid, offset, scales)
    x = rows_of(rows, rows, grid.n_in, dtype=dtype)
    y = product(x, case.w, case.bias, implementation=implementation)
    assert (y.shape, y.dtype) == ((rows, grid.n_out), dtype)
    truth = np.asarray(x, np.float64) @ case.matrix + np.asarray(case.bias, np.float64)
    assert error(y, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("grid", [Grid(4, 200, 41, 32), Grid(4, 100, 33, 20)], ids=str)
def test_the_bias_is_added_to_the_rounded_product(implementation: str, grid: Grid) -> None:
    case = Case.random(0, grid)
    x = rows_of(0, 3, grid.n_in, dtype=jnp.float16)
    y = product(x, case.w, implementation=implementation)
    with_bias = product(x, case.w, case.bias, implementation=implementation)
    np.testing.assert_array_equal(with_bias, y + case.bias.astype(jnp.float16))


@pytest.mark.parametrize("grid", [Grid(4, 200, 41, 32), Grid(4, 100, 33, 20)], ids=str)
def test_a_traced_layer_of_a_stack_is_that_layer(implementation: str, grid: Grid) -> None:
    cases = [Case.random(seed, grid, jnp.float16) for seed in range(3)]
    stack = stacked([case.w for case in cases])
    biases = jnp.asarray(np.stack([case.bias for case in cases]))
    x = rows_of(0, 2, grid.n_in, dtype=jnp.float16)
    for layer, case in enumerate(cases):
        alone = product(x, case.w, case.bias, implementation=implementation)
        index = jnp.full((1,) if layer else (), layer, jnp.int32)
        of_stack = product(x, stack, biases, layer=index, implementation=implementation)
        np.testing.assert_array_equal(of_stack, alone)


def test_a_row_is_the_same_in_any_company_of_its_bucket(implementation: str) -> None:
    case = Case.random(1, Grid(4, 256, 64, 64))
    x = rows_of(1, 8, 256, dtype=jnp.float32)
    together = product(x, case.w, implementation=implementation)
    truth = np.asarray(x, np.float64) @ case.matrix
    assert error(together, truth) < TOLERANCE[jnp.float32]
    other = product(jnp.concatenate([x[3:5], -x[:6]]), case.w, implementation=implementation)
    np.testing.assert_array_equal(other[:2], together[3:5])
    if implementation == "triton":
        np.testing.assert_array_equal(product(x[3:4], case.w, implementation=implementation), together[3:4])


BLOCKS = (
    FewRows(8, 1, warps=2, tiles=2, rotate=True, ahead=2, x_ahead=2, unroll=3),
    FewRows(8, 2, warps=1, x_ahead=1, unroll=2),
    FewRows(16, 2, warps=2, split=3),
    ManyRows(16, 2, warps=1),
    ManyRows(16, 1, warps=2, halves=True, split=3),
    ManyRows(32, 2, warps=4, stages=2, split=4),
)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("grid", [Grid(4, 1024, 64, 64), Grid(4, 390, 41, 64)], ids=str)
def test_blocks_change_the_order_of_the_sum_alone(grid: Grid, blocks: FewRows | ManyRows) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    from lotaqaf_jax.kernels.matmul.gpu import fused

    case = Case.random(1, grid)
    x = rows_of(1, 11, grid.n_in, dtype=jnp.float32)
    truth = np.asarray(x, np.float64) @ case.matrix + np.asarray(case.bias, np.float64)
    assert error(fused(x, [case.w], [case.bias], None, blocks)[0], truth) < TOLERANCE[jnp.float32]


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights of one x: ``grid`` for each of ``widths`` instead of its own, with one type of offset and bias."""

    grid: Grid
    widths: tuple[int, ...]
    rows: int = 2
    dtype: Any = jnp.float16
    offset: Any = None
    bias: Any = None

    def __str__(self) -> str:
        return f"{self.grid}-{self.widths}-{self.rows}"

    @property
    def x(self) -> jax.Array:
        return rows_of(7, self.rows, self.grid.n_in, dtype=self.dtype)

    def weights(self, layers: int = 1) -> tuple[list[QuantizedWeight], list[jax.Array | None]]:
        """Stacks of weights and of biases."""
        found = []
        for number, width in enumerate(self.widths):
            grid = dataclasses.replace(self.grid, n_out=width)
            cases = [Case.random(10 * number + layer, grid, self.offset) for layer in range(layers)]
            found.append((stacked([case.w for case in cases]), np.stack([case.bias for case in cases])))
        return [w for w, _ in found], [None if self.bias is None else jnp.asarray(bias, self.bias) for _, bias in found]


# One launch each.
GROUPS = (
    Group(Grid(4, 256, 0, 64), (64, 32, 32), 1, jnp.bfloat16, None, jnp.float32),  # like q, k and v
    Group(Grid(4, 256, 0, 64), (64, 64), 9, jnp.float32),  # like gate and up
    Group(Grid(4, 256, 0, 128), (32, 96, 64), offset=jnp.float16),  # three different widths
    Group(Grid(4, 200, 0, 32), (41, 3, 33), 3, offset=jnp.float32, bias=jnp.float16),
    Group(Grid(4, 130, 0, -1), (40, 40, 7), 20, jnp.float32, bias=jnp.float16),
    Group(Grid(2, 200, 0, 32), (33, 64, 33), bias=jnp.float16),  # the first and the last alike
    Group(Grid(3, 200, 0, 64), (41, 32, 32), 40),
    Group(Grid(8, 90, 0, 32), (64, 33), 65, offset=jnp.float16),
)
# A launch each, or none.
SINGLE = (
    (Group(Grid(4, 128, 0, 32), (33, 16, 16, 8)), 4),  # more than the kernel takes
    (Group(Grid(4, 128, 0, 32, act_order=True), (33, 16)), 0),
    (Group(Grid(4, 100, 0, 20), (33, 16)), 0),
    (Group(Grid(4, 128, 0, 32), (33, 16), dtype=jnp.float32, offset=jnp.float16), 0),
    (Group(Grid(4, 128, 0, 32), (33, 16), rows=129), 0),
)


def launches_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of outputs, single numbers apart, of every launch of the packed matmul."""
    from lotaqaf_jax.kernels.matmul import gpu

    launch, made = gpu.launch, []

    def count(*inputs: Any, out: Sequence[jax.ShapeDtypeStruct], **rest: Any) -> list[jax.Array]:
        made.append(sum(len(one.shape) > 1 for one in out))
        return launch(*inputs, out=out, **rest)

    monkeypatch.setattr(gpu, "launch", count)
    return made


ALL = [(group,) for group in (*GROUPS, *(group for group, _ in SINGLE))]


# Plain JAX has no launches to share: two layouts with an offset, one act-order, one without whole words.
@pytest.mark.parametrize(("implementation", "group"), cases(xla=[ALL[i] for i in (2, 3, 9, 10)], triton=ALL), ids=str)
def test_several_products_are_those_of_single_calls(implementation: str, group: Group) -> None:
    weights, biases = group.weights(layers=2)
    index = jnp.asarray(1, jnp.int32)
    together = products(group.x, weights, biases, layer=index, implementation=implementation)
    assert len(together) == len(weights)
    for y, w, bias in zip(together, weights, biases, strict=True):
        alone = product(group.x, w, bias, layer=index, implementation=implementation)
        assert (y.shape, y.dtype) == ((group.rows, w.shape[1]), group.dtype)
        assert np.abs(np.asarray(y, np.float32)).max() > 0
        np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize(("group", "singles"), [*((group, 0) for group in GROUPS), *SINGLE], ids=str)
def test_what_is_alike_takes_one_launch(group: Group, singles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    made = launches_of(monkeypatch)
    weights, biases = group.weights()
    jax.eval_shape(lambda x: packed_matmul_many(x, weights, biases, layer=0, implementation="triton"), group.x)
    assert made == ([len(weights)] if group in GROUPS else [1] * singles)


def test_what_differs_takes_a_launch_each(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Case.random(1, Grid(4, 128, 33, 32))
    others = [
        (Case.random(2, Grid(8, 128, 16, 32)).w, base.bias[:16]),
        (Case.random(2, Grid(4, 128, 16, 64)).w, base.bias[:16]),
        (Case.random(2, Grid(4, 128, 16, 32), jnp.float16).w, base.bias[:16]),
        (Case.random(2, Grid(4, 128, 16, 32), scales=jnp.float32).w, base.bias[:16]),
        (Case.random(2, Grid(4, 128, 16, 32)).w, base.bias[:16].astype(jnp.float16)),
        (Case.random(2, Grid(4, 128, 16, 32)).w, None),
    ]
    made = launches_of(monkeypatch) if implementation == "triton" else []
    x = rows_of(3, 2, 128, dtype=jnp.float16)
    for w, bias in others:
        together = packed_matmul_many(x, (base.w, w), (base.bias, bias), implementation=implementation)
        np.testing.assert_array_equal(together[0], packed_matmul(x, base.w, base.bias, implementation=implementation))
        np.testing.assert_array_equal(together[1], packed_matmul(x, w, bias, implementation=implementation))
    assert set(made) == ({1} if implementation == "triton" else set())


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_company_does_not_change_the_order_of_a_sum(blocks: FewRows | ManyRows) -> None:
    """Where warps share k, programs start in different rounds, or the sum is split."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    from lotaqaf_jax.kernels.matmul.gpu import fused

    group = Group(Grid(4, 512, 0, 64), (64, 41), 11, jnp.float32, bias=jnp.float32)
    weights, biases = group.weights(layers=2)
    together = fused(group.x, weights, biases, 1, blocks)
    for y, w, bias in zip(together, weights, biases, strict=True):
        np.testing.assert_array_equal(y, fused(group.x, [w], [bias], 1, blocks)[0])


def test_warps_go_by_the_columns_of_a_launch() -> None:
    for rows in (1, 16, 64):
        some, others = (matmul_blocks(rows, 5120, widths, 4, 64) for widths in ((5120, 1024, 1024), (6144, 1024)))
        assert some == others
        assert matmul_blocks(rows, 5120, (1024, 1024), 4, 64) != matmul_blocks(rows, 5120, (13824, 13824), 4, 64)


@pytest.mark.parametrize(("n_in", "n_out"), [(13824, 5120), (5120, 5120), (5120, 1024), (28672, 8192), (4096, 4096)])
def test_a_narrow_weight_shares_k_between_programs_that_fit_at_once(n_in: int, n_out: int) -> None:
    for bits in (2, 3, 4, 8):
        blocks = matmul_blocks(1, n_in, (n_out,), bits, 64)
        assert blocks is not None
        assert blocks.split > 1
        assert n_in % (blocks.split * blocks.warps * blocks.steps * 4 * period_of(bits)[0]) == 0
        assert blocks.split * blocks.warps * n_out / 32 <= 2112


def test_wide_and_several_weights_and_odd_sizes_do_not_share_k() -> None:
    for n_in, widths in ((5120, (13824,)), (5120, (5120, 1024, 1024)), (5120 + 32, (5120,))):
        blocks = matmul_blocks(1, n_in, widths, 4, 32)
        assert blocks is not None
        assert blocks.split == 1


def test_every_supported_layout_of_a_model_has_blocks() -> None:
    for bits in (2, 3, 4, 8):
        for group in (32, 64, 128, 5120):
            for rows in (1, 16, 64, 128):
                blocks = matmul_blocks(rows, 5120, (13824,), bits, group)
                assert blocks is not None
                assert blocks.rows >= min(rows, 32)
                assert blocks.warps in (2, 4, 8, 16)
    assert matmul_blocks(129, 5120, (13824,), 4, 64) is None
    assert matmul_blocks(1, 5120, (13824,), 4, 20) is None
    assert [bucket_of(rows) for rows in (1, 8, 9, 128, 129)] == [8, 8, 16, 128, None]


def test_blocks_depend_on_rows_through_the_bucket_alone() -> None:
    for few, many in ((1, 8), (9, 16), (17, 32), (33, 64), (65, 128)):
        for width in (1024, 13824):
            assert matmul_blocks(few, 5120, (width,), 4, 64) == matmul_blocks(many, 5120, (width,), 4, 64)


def test_programs_for_many_rows_fill_the_card_and_its_shared_memory_alone() -> None:
    for bits in (2, 3, 4, 8):
        for group in (32, 64, 128, 5120):
            for rows in (32, 64, 128):
                for terms in (1, 3):
                    blocks = matmul_blocks(rows, 5120, (5120,), bits, group, terms)
                    assert isinstance(blocks, ManyRows)
                    assert blocks.stages >= 2
                    values, words = period_of(bits)
                    depth = 4 * values * blocks.steps
                    assert group % depth == 0 or depth % group == 0
                    x = terms * max(1, depth // group) * depth * blocks.rows * 2
                    assert (blocks.stages - 1) * (x + 4 * words * blocks.steps * 4 * 32 * blocks.warps) < 110 * 1024
                    programs = -(-rows // blocks.rows) * 5120 // (32 * blocks.warps)
                    assert programs * blocks.split * blocks.warps >= 4 * 132


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_terms_of_a_prepared_float32_are_all_of_it(bits: int) -> None:
    pytest.importorskip("triton")
    from lotaqaf_jax.kernels.matmul.gpu import prepared

    x = rows_of(3, 9, 200, dtype=jnp.float32)
    out = prepared(x, bits, 2, (16, 256))
    assert (out.shape, out.dtype) == ((3, 2, 16, 256), jnp.bfloat16)
    whole = np.asarray(out, np.float64).sum(axis=(0, 1))
    # The same numbers in another order, every one in one part, the rest zeros.
    np.testing.assert_allclose(np.sort(np.abs(whole[:9]))[:, 56:], np.sort(np.abs(np.asarray(x))), rtol=2**-24)
    assert not whole[9:].any()
    assert (np.count_nonzero(np.asarray(out[2], np.float32), axis=0) <= 1).all()


def test_arguments_that_do_not_fit_are_named() -> None:
    w = Case.random(1, Grid(4, 64, 16, 32)).w
    x = jnp.ones((2, 64))
    stack = jax.tree.map(lambda leaf: leaf[None], w)
    with pytest.raises(ConfigError, match=r"x has shape \(2, 63\), expected \(rows, 64\)"):
        packed_matmul(x[:, :63], w)
    with pytest.raises(ConfigError, match="x is int32"):
        packed_matmul(x.astype(jnp.int32), w)
    with pytest.raises(ConfigError, match="layer is None; pass layer with a stack"):
        packed_matmul(x, stack)
    with pytest.raises(ConfigError, match="0 axes of layers, and layer is given"):
        packed_matmul(x, w, layer=0)
    with pytest.raises(ConfigError, match=r"bias has shape \(3,\), expected \(16,\)"):
        packed_matmul(x, w, jnp.ones(3))
    with pytest.raises(ConfigError, match="found 2 weights and 1 biases"):
        packed_matmul_many(x, (w, w), (None,))
    with pytest.raises(ConfigError, match="found 0 weights"):
        packed_matmul_many(x, ())
    with pytest.raises(ConfigError, match=r"x has shape \(2, 64\), expected \(rows, 32\)"):
        packed_matmul_many(x, (w, Case.random(1, Grid(4, 32, 16, 32)).w))
    with pytest.raises(ConfigError, match="implementation: found 'cuda'"):
        packed_matmul(x, w, implementation="cuda")
