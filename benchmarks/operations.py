"""What kernels.py measures: operations, each in two ways, on random inputs of real shapes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from common import copies
from flax import nnx
from models import random_layer

from lotaqaf_jax.kernels import TernaryAdapter, weight_matrix
from lotaqaf_jax.kernels.adjust.gpu import merged
from lotaqaf_jax.kernels.float8 import float8_weight_gradient
from lotaqaf_jax.kernels.gradient import gpu as gradient_gpu
from lotaqaf_jax.models import Decoder, QuantSpec, dense_spec, linears
from lotaqaf_jax.models.presets import preset
from lotaqaf_jax.optim import reference_schedule, t_signsgd
from lotaqaf_jax.optim.quantile import kth_largest, lower_neighbour
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.ternary import adapter_gradients, merge

__all__ = ["CALLS", "LAYERS", "TOKENS", "Line", "float8", "of_words", "optimizer", "threshold"]

TOKENS, LAYERS, STEPS = 8192, 48, 300
CALLS = 8
"""Of one program, at least."""
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Line:
    """One operation: functions by the name of their column, and the inputs of every call.

    ``bytes`` are those that are read and written at least. Results agree with those of the first column bit for bit, or
    to the relative error ``tolerance``, after ``whole`` has put together what a function left in parts.
    """

    name: str
    columns: dict[str, Callable[..., Any]]
    inputs: Sequence[tuple[Any, ...]]
    bytes: float
    tolerance: float = 0.0
    whole: Callable[[Any], Any] = lambda found: found


def of_words(n_in: int, n_out: int, bits: int, options: argparse.Namespace) -> Iterator[Line]:
    """What reads packed words, and the gradient, whose inputs are the same layer."""
    quant = QuantSpec(bits, options.group_size)
    count = copies(n_in * n_out * bits / 8, CALLS)
    inputs = [random_layer(i, (n_in, n_out), quant, options.rank, options.omega) for i in range(count)]

    def rule(t: TernaryAdapter) -> dict[str, Any]:
        return {"omega": t.omega, "offset": t.offset}

    def plain_merge(w: QuantizedWeight, t: TernaryAdapter) -> tuple[Any, ...]:
        found = merge(w, t.a, t.b, **rule(t), offset_dtype=t.offset_dtype)
        return found.qweight, found.offset

    def our_merge(w: QuantizedWeight, t: TernaryAdapter) -> tuple[Any, ...]:
        # Not in place: the words of every call are needed again.
        found, _ = merged(w, t)
        return found.qweight, found.offset

    def adjusted(implementation: str) -> Any:
        return lambda w, t: weight_matrix(w, t, DTYPE, implementation)

    def dequantize(implementation: str) -> Any:
        return lambda w: weight_matrix(w, None, DTYPE, implementation)

    def gradient(function: Any) -> Any:
        return lambda w, t, dweight: function(w, t.a, t.b, dweight, **rule(t))

    w, _, dweight = inputs[0]
    words, grid, weight = w.qweight.nbytes, w.scales.nbytes + w.zeros.nbytes, dweight.nbytes
    layers = [(w, t) for w, t, _ in inputs]
    yield Line("adjusted", {"xla": adjusted("xla"), "triton": adjusted("triton")}, layers, words + grid + weight)
    mu = 4 * w.zeros.size
    yield Line("merge", {"xla": plain_merge, "triton": our_merge}, layers, 2 * words + mu)
    merged_words = [(dataclasses.replace(w, offset=0.5 * w.zeros.astype(jnp.float32)),) for w, _, _ in inputs]
    columns = {"xla": dequantize("xla"), "triton": dequantize("triton")}
    yield Line("dequantize", columns, merged_words, words + grid + mu + weight)
    columns = {"xla": gradient(adapter_gradients), "triton": gradient(gradient_gpu.adapter_gradients)}
    yield Line("gradient", columns, inputs, weight, tolerance=5e-3)


def float8(n_in: int, n_out: int) -> Line:
    """dW = x.T @ dy; the result in float8 is a matrix and its factor, which is multiplied into smaller things."""
    keys = jax.random.split(jax.random.key(0), 8)
    xs = [jax.random.normal(key, (TOKENS, n_in), jnp.bfloat16) for key in keys[:4]]
    dys = [1e-3 * jax.random.normal(key, (TOKENS, n_out), jnp.bfloat16) for key in keys[4:]]
    columns = {
        "xla": lambda x, dy: jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ()))),
        "triton": lambda x, dy: float8_weight_gradient(x, dy, "triton"),
    }
    size = 2 * (TOKENS * (n_in + n_out) + n_in * n_out)

    def whole(found: Any) -> Any:
        return found[0].astype("float32") * found[1] if isinstance(found, tuple) else found

    return Line("float8", columns, list(zip(xs, dys, strict=True)), size, tolerance=0.1, whole=whole)


def sorted_entry(magnitude: jax.Array, rank: int) -> jax.Array:
    """The entry of this rank from the top, of every layer."""
    layers = magnitude.reshape(magnitude.shape[0], -1)
    return jnp.sort(layers, axis=1)[:, layers.shape[1] - 1 - rank, None, None]


def threshold(n_in: int, rank: int) -> Line:
    """The quantile of |g| at the first level of the schedule."""
    place = int(lower_neighbour(reference_schedule(STEPS)(1), n_in * rank))
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [(jnp.abs(jax.random.normal(key, (LAYERS, n_in, rank), jnp.float32)),) for key in keys]
    columns = {"sort": lambda g: sorted_entry(g, place), "quantile": lambda g: kth_largest(g, place, (1, 2))}
    return Line("threshold", columns, inputs, 4 * LAYERS * n_in * rank)


def optimizer(model: str, options: argparse.Namespace) -> Line:
    """The first step of a run; tensors as a model stacks them."""
    config, quant = preset(model), QuantSpec(options.bits[0], options.group_size)
    decoder = nnx.eval_shape(lambda: Decoder(config, dense_spec(config, jnp.float16, quant), jnp.bfloat16))
    shapes = []
    for names, linear in linears(decoder):
        n_in, n_out = linear.packed.shape
        shapes += [(len(names), n_in, options.rank), (len(names), options.rank, n_out)]
    keys = jax.random.split(jax.random.key(0), (len(shapes), 2))
    params = [jax.random.randint(key[0], shape, -1, 2, jnp.int8) for key, shape in zip(keys, shapes, strict=True)]
    grads = [jax.random.normal(key[1], shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True)]
    rule = t_signsgd(STEPS, "reference", stacked_axes=1)
    tail = reference_schedule(STEPS)(1)

    def update(grads: Any, params: Any, state: Any) -> Any:
        updates, _ = rule.update(grads, state, params)
        return optax.apply_updates(params, updates)

    def by_sort(grads: Any, params: Any, state: Any) -> Any:
        def one(grad: jax.Array, param: jax.Array) -> jax.Array:
            magnitude = jnp.abs(grad)
            sigma = sorted_entry(magnitude, int(lower_neighbour(tail, grad[0].size)))
            step = jnp.where(magnitude > jnp.maximum(1e-9, sigma), jnp.sign(grad), 0)
            return jnp.clip(param - step.astype(param.dtype), -1, 1)

        return jax.tree.map(one, grads, params)

    values = sum(param.size for param in params)
    return Line("optimizer", {"sort": by_sort, "quantile": update}, [(grads, params, rule.init(params))], 6 * values)
