"""Ternary parameters trained through float32 latents by any optax optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lotaqaf_jax.optim.checks import check_grads, check_type, is_none

__all__ = ["LatentState", "ternary_adam", "with_latents"]


class LatentState(NamedTuple):
    """State of `with_latents`.

    Attributes:
      latents: float32, shaped like the parameters; None where a parameter is None.
      inner: the state of the inner optimizer, which has the latents as its parameters.
    """

    latents: Any
    inner: Any


def with_latents(
    inner: optax.GradientTransformation, *, bound: float | jax.Array = 1.5
) -> optax.GradientTransformationExtraArgs:
    r"""Ternary parameters P as the rounded values of float32 latents L, which an inner optimizer trains.

    At step t = 1, 2, ..., with g the gradient with respect to P, U the update of ``inner`` and :math:`L_0 = P_0`:

    .. math::
      L_t = \mathrm{clip}(L_{t-1} + U(g_t; L_{t-1}), -\mathrm{bound}, \mathrm{bound}), \qquad
      P_t = \mathrm{sign}(L_t) \cdot 1[|L_t| > 1/2]

    The gradient passes straight through the rounding. This is for gradients too noisy to move a value at a single step:
    the latents take a vote over steps, and a value flips when the sum crosses 1/2. ``bound`` limits how far a latent
    runs beyond its value, and so how many steps it takes to come back.

    The update is :math:`P_t - P`, with P the parameters that ``update`` is given. Where these were changed from
    outside, the next step returns to what the latents say. A parameter whose gradient is None keeps its value and its
    latent; ``inner`` sees a gradient of zero there, so that its state keeps its structure.

    A NaN that ``inner`` returns, as Adam does from a NaN or infinite gradient on, stays in the latent. Its parameter is
    then 0, so that nothing in the model shows it: a training loop has to look for it in the gradients or the latents.
    ``optax.apply_if_finite`` around ``inner`` leaves out such a step.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from lotaqaf_jax.optim import with_latents
      >>> params = {"A": jnp.array([1, 0, 0], jnp.int8)}
      >>> optimizer = with_latents(optax.sgd(0.25))
      >>> state = optimizer.init(params)
      >>> for grads in ([2.0, -1.0, 1.0], [2.0, -1.0, -1.0], [2.0, -1.0, 1.0]):
      ...     updates, state = optimizer.update({"A": jnp.array(grads)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(state.latents["A"].tolist(), params["A"].tolist())
      [0.5, 0.25, -0.25] [0, 0, 0]
      [0.0, 0.5, 0.0] [0, 0, 0]
      [-0.5, 0.75, -0.25] [0, 1, 0]

    References:
      Courbariaux et al., "BinaryConnect: Training Deep Neural Networks with binary weights during propagations",
      https://arxiv.org/abs/1511.00363, Algorithm 1, for two values. Not in the paper of LoTA-QAF.

    .. note::
      Under ``optax.inject_hyperparams`` give ``hyperparam_dtype=jnp.float32``: else it casts numbers to the type of the
      parameters, which is int8 at times.

    Args:
      inner: any optimizer. It gets float32 gradients, the latents as ``params``, and the extra arguments of ``update``.
        Weight decay in it pulls the latents, and so the values, to 0.
      bound: the largest |L| after a step, above 1/2.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Parameters are a pytree of arrays of any shape, of a float or signed
      integer type, with values in {-1, 0, 1}, which is not checked. Gradients have the same structure and shapes, and a
      float type. Updates have the parameters' types, and ``optax.apply_updates`` gives :math:`P_t` exactly. Every entry
      is on its own, unless ``inner`` connects them: stacked layers train like separate ones. Memory: one float32
      number a value, beside the state of ``inner``.

    Raises:
      ValueError: bound is not above 1/2. By ``init``: a parameter of another type. By ``update``: no parameters, or a
        gradient of another shape or not of a float type.
    """
    if isinstance(bound, int | float) and not bound > 0.5:
        raise ValueError(f"bound is {bound}, expected more than 0.5: no latent could reach a value of -1 or 1.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LatentState:
        jax.tree_util.tree_map_with_path(check_type, params)
        # A copy, also of float32 parameters: a step that donates both cannot have one buffer twice.
        latents = jax.tree.map(lambda param: jnp.array(param, jnp.float32, copy=True), params)
        return LatentState(latents, inner.init(latents))

    def update(updates: Any, state: LatentState, params: Any = None, **extra_args: Any) -> tuple[Any, LatentState]:
        check_grads("with_latents", updates, params)

        def float_grad(grad: Any, latent: Any) -> Any:
            if latent is None:
                return None
            return jnp.zeros_like(latent) if grad is None else jnp.asarray(grad, jnp.float32)

        def moved(grad: Any, latent: Any, by: Any) -> Any:
            if grad is None or latent is None:
                return latent
            return jnp.clip(latent + by, -bound, bound).astype(jnp.float32)

        def difference(grad: Any, latent: Any, param: Any) -> Any:
            """Parameter after the step, less the parameter."""
            if param is None:
                return None
            return jnp.zeros_like(param) if grad is None else _ternary(latent).astype(param.dtype) - param

        grads = _map(float_grad, updates, state.latents)
        inner_updates, inner_state = inner.update(grads, state.inner, state.latents, **extra_args)
        latents = _map(moved, updates, state.latents, inner_updates)
        return _map(difference, updates, latents, params), LatentState(latents, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def ternary_adam(
    learning_rate: float | jax.Array | optax.Schedule = 0.2,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    bound: float | jax.Array = 1.5,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the latents of ternary parameters: `with_latents` of ``optax.adam``.

    While its gradient keeps its sign and size, an entry's latent moves by about ``learning_rate`` a step: a zero flips
    after 1/2 / learning_rate such steps. Where the sign changes from step to step, the latent hardly moves.

    Memory: three float32 numbers a value, the latent and Adam's two averages.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from lotaqaf_jax.optim import ternary_adam
      >>> target = jnp.array([1.0, 0.0, -1.0])
      >>> loss = lambda params: jnp.sum((params["A"] - target) ** 2)
      >>> params = {"A": jnp.zeros(3, jnp.int8)}
      >>> optimizer = ternary_adam(optax.cosine_decay_schedule(0.2, decay_steps=20))
      >>> state = optimizer.init(params)
      >>> for _ in range(4):
      ...     grads = jax.grad(loss)(optax.tree.cast(params, jnp.float32))
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["A"].tolist())
      [0, 0, 0]
      [0, 0, 0]
      [1, 0, -1]
      [1, 0, -1]

    References:
      Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980; the latents as at
      `with_latents`. Not in the paper of LoTA-QAF.

    Args:
      learning_rate: a number of at least 0, or a function of the updates made so far, as in optax.
      b1: decay of the average of the gradients, in [0, 1).
      b2: decay of the average of their squares, in [0, 1).
      eps: added to the root of the latter.
      bound: the largest |L| after a step, above 1/2.

    Returns:
      As `with_latents`. The state's ``inner`` is that of ``optax.adam``.

    Raises:
      ValueError: learning_rate, b1, b2 or bound out of range. By ``init`` and ``update`` as `with_latents`.
    """
    if isinstance(learning_rate, int | float) and not learning_rate >= 0:
        raise ValueError(f"learning_rate is {learning_rate}, expected 0 or more.")
    for name, decay in (("b1", b1), ("b2", b2)):
        if isinstance(decay, int | float) and not 0 <= decay < 1:
            raise ValueError(f"{name} is {decay}, expected a decay in [0, 1).")
    return with_latents(optax.adam(learning_rate, b1, b2, eps), bound=bound)


def _ternary(latent: jax.Array) -> jax.Array:
    """int8 of the same shape: 1 above 1/2, -1 below -1/2, else 0, which NaN is too."""
    return (latent > 0.5).astype(jnp.int8) - (latent < -0.5).astype(jnp.int8)


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, *trees, is_leaf=is_none)
