"""What parameters and gradients of a ternary optimizer have to be, in errors that name the parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["check_grads", "check_ternary", "check_type", "is_none", "name"]


def check_type(path: Any, param: Any) -> None:
    """Refuse a parameter, any shape, whose type is neither float nor signed integer, with a ValueError."""
    dtype = jnp.result_type(param)
    if not (jnp.issubdtype(dtype, jnp.signedinteger) or jnp.issubdtype(dtype, jnp.floating)):
        raise ValueError(f"Parameter {name(path)} is {dtype}, expected a float or signed integer type.")


def check_ternary(path: Any, param: Any) -> None:
    """Refuse a parameter, any shape, with a value other than -1, 0 or 1, with a ValueError. Reads the values."""
    param = jnp.asarray(param)
    wrong = (param != -1) & (param != 0) & (param != 1)
    if wrong.any():
        index = tuple(int(i) for i in jnp.unravel_index(jnp.argmax(wrong), param.shape))
        raise ValueError(
            f"Parameter {name(path)} is {param[index]} at {index}, expected -1, 0 or 1: "
            "ternarise it, or leave it to another optimizer with optax.masked or optax.multi_transform."
        )


def check_grads(optimizer: str, grads: Any, params: Any) -> None:
    """Refuse what ``update`` of ``optimizer`` cannot work on, with a ValueError.

    Refused are params that are None as a whole, and a gradient of another type than float or of another shape than its
    parameter. Single gradients and parameters may be None.
    """
    if params is None:
        raise ValueError(f"{optimizer} needs the parameters: call update(gradients, state, params).")
    jax.tree_util.tree_map_with_path(_check_grad, grads, params, is_leaf=is_none)


def is_none(node: Any) -> bool:
    """Whether a node of a tree is None: ``is_leaf`` for maps over gradients, where None stands for no gradient."""
    return node is None


def name(path: Any) -> str:
    """The path of a parameter in its tree, as in ['layer']['A']."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def _check_grad(path: Any, grad: Any, param: Any) -> None:
    if grad is None or param is None:
        return
    if not jnp.issubdtype(grad.dtype, jnp.floating):
        raise ValueError(
            f"The gradient of parameter {name(path)} is {grad.dtype}, expected a float type: "
            "differentiate integer parameters through a float copy of them."
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"The gradient of parameter {name(path)} has shape {grad.shape}, expected {param.shape} as the parameter."
        )
