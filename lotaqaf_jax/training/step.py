"""One update: gradients of the adapters over all accumulated batches, then the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.kernels.sharding import BATCH
from lotaqaf_jax.models import Adapter, Decoder, Recompute, adapted_linears, with_omegas
from lotaqaf_jax.training.loss import summed_loss

__all__ = ["Metrics", "TrainState", "make_train_step", "nonfinite_tensors", "split_model"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: ``adapters`` (an NNX state), int8 or float32 as their method has them, ``opt_state``,
    and ``step``, the updates done."""

    adapters: nnx.State
    opt_state: Any
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step: ``loss`` in nats per target token before the update, ``grad_norm`` over all adapters,
    ``changed`` the number of ternary values that moved, None where the adapters are floats, ``tokens`` those of the
    batch that are not padding, and ``squares`` the sum of squared gradients per tensor, by which a NaN is traced to its
    tensor."""

    loss: jax.Array
    grad_norm: jax.Array
    changed: jax.Array | None
    tokens: jax.Array
    squares: nnx.State


def split_model(model: Decoder) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, adapters, everything else) of a model with adapters; ``nnx.merge`` puts it together."""
    parts: tuple[Any, ...] = nnx.split(model, Adapter, ...)
    return parts[0], parts[1], parts[2]


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    recompute: Recompute = "block",
    packed: bool = True,
    share: Callable[[jax.Array], jax.Array] | None = None,
    placed: TrainState | None = None,
) -> Callable[[TrainState, nnx.State, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Build the jitted training step.

    The gradient is that of the mean loss over all target tokens of the batch, whichever part they are in:

        g = sum over parts of d(summed loss of the part) / number of targets in all parts

    Args:
        graph: structure of the model, of :func:`split_model`.
        optimizer: of the adapters: t-SignSGD for ternary ones.
        accumulate: number of parts that the batch is cut into along its rows, computed one after the other.
        recompute: what the backward pass computes again, see :meth:`lotaqaf_jax.models.Decoder.hidden_states`.
        packed: whether a row may hold several examples, which takes a mask over all pairs of tokens.
        share: t -> the share of entries of A @ B that pass omega in step t = 1, 2, ...; None leaves omega as it is.
        placed: a state whose arrays lie on a mesh as the step shall leave them; None on one device.

    Returns:
        (state, frozen, batch) -> (state, metrics). ``state`` is donated. ``batch`` holds arrays (accumulate *
        rows, length).
    """

    mesh = mesh_of(placed)

    def loss_of(adapters: nnx.State, frozen: nnx.State, part: dict[str, jax.Array]) -> jax.Array:
        return summed_loss(nnx.merge(graph, adapters, frozen), part, recompute=recompute, packed=packed)

    # Its name is what profilers and logs of the compiler show.
    def train_step(state: TrainState, frozen: nnx.State, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        if share is not None:
            _, _, frozen = split_model(with_omegas(nnx.merge(graph, state.adapters, frozen), share(state.step + 1)))
        # int8 has no gradient: take it at a float copy. Floats are what they are.
        floats = jax.tree.map(lambda array: array.astype(jnp.float32), state.adapters)
        if accumulate == 1:
            loss, gradients = jax.value_and_grad(loss_of)(floats, frozen, batch)
        else:
            parts = jax.tree.map(lambda array: array.reshape(accumulate, -1, *array.shape[1:]), batch)
            if mesh is not None:  # Each part over all devices.
                parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, P(None, BATCH)))

            def add(total: tuple[jax.Array, nnx.State], part: dict[str, jax.Array]) -> tuple[Any, None]:
                loss, gradients = jax.value_and_grad(loss_of)(floats, frozen, part)
                return (total[0] + loss, jax.tree.map(jnp.add, total[1], gradients)), None

            nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, floats))
            (loss, gradients), _ = jax.lax.scan(add, nothing, parts)
        targets = jnp.maximum((batch["labels"][:, 1:] != IGNORE).sum(), 1).astype(jnp.float32)
        gradients = jax.tree.map(lambda gradient: gradient / targets, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        squares = jax.tree.map(lambda gradient: jnp.square(gradient).sum(axis=(-2, -1)), gradients)
        metrics = Metrics(
            loss=loss / targets,
            grad_norm=jnp.sqrt(sum(leaf.sum() for leaf in jax.tree.leaves(squares))),
            changed=_moved(updates),
            tokens=(batch["segment_ids"] > 0).sum(),
            squares=squares,
        )
        return TrainState(adapters, opt_state, state.step + 1), metrics

    places = None
    if placed is not None and mesh is not None:
        places = (jax.tree.map(lambda leaf: leaf.sharding, placed), NamedSharding(mesh, P()))
    return jax.jit(train_step, donate_argnums=0, out_shardings=places, compiler_options=_compiler_options())


def mesh_of(state: TrainState | None) -> Mesh | None:
    """The mesh that a state's arrays lie on; None on one device."""
    where = None if state is None else state.step.sharding
    return where.mesh if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else None


def _moved(updates: nnx.State) -> jax.Array | None:
    """How many ternary values an update moves; None where adapters are floats, which all move a little."""
    leaves = jax.tree.leaves(updates)
    if not all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves):
        return None
    return sum(((leaf != 0).sum(dtype=jnp.int32) for leaf in leaves), jnp.int32(0))


def _compiler_options() -> dict[str, bool] | None:
    """Options of XLA for the training step, for ``jax.jit``; None where there is nothing to say.

    On a GPU all products go to cuBLAS. XLA would compile and time Triton kernels of its own for each: a 14B step then
    takes five times as long to compile, and comes out no faster, since the large products are cuBLAS's either way.

    Nor does XLA let a product write straight into the stack of what the backward pass reads ("dynamic slice fusion"):
    where the product is also read at once, as those of "products" are, it would compute it twice.
    """
    if jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": False}


def nonfinite_tensors(model: Decoder, squares: nnx.State) -> Iterator[str]:
    """Names of the adapter tensors whose gradient is NaN or infinite.

    Args:
        model: the model that was trained; only its structure is looked at.
        squares: ``Metrics.squares``.
    """
    graph, _, frozen = split_model(model)
    for names, _, adapter in adapted_linears(nnx.merge(graph, squares, frozen)):
        for part, values in zip(adapter.parts, (adapter.a, adapter.b), strict=True):
            for name, value in zip(names, values, strict=True):
                if not jnp.isfinite(value):
                    yield f"{name}.{part}"
