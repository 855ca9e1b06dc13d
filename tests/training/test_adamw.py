"""AdamW and its learning rate are torch's and transformers'."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from lotaqaf_jax.training.adamw import adamw, learning_rates


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(7, 0.0), (40, 0.1), (11, 0.25), (1, 0.0)])
def test_learning_rates_are_those_of_transformers(scheduler: Any, total: int, warmup: float) -> None:
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-3)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    theirs = get_scheduler(name, optimizer, num_warmup_steps=int(np.ceil(warmup * total)), num_training_steps=total)
    ours = learning_rates(3e-3, total, scheduler=scheduler, warmup_ratio=warmup)
    for step in range(total):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-9, err_msg=str(step))
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("norm", "decay"), [(0.3, 0.0), (0.3, 0.1), (0.0, 0.0)])
def test_steps_are_those_of_torch(norm: float, decay: float) -> None:
    """Gradients above and below the norm, one entry always 0, a learning rate that rises and falls."""
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(2, 6, 4)), "b": rng.normal(size=(2, 4, 5))}
    rates = learning_rates(1e-2, 12, scheduler="cosine", warmup_ratio=0.2)
    optimizer = adamw(rates, max_grad_norm=norm, weight_decay=decay)
    ours = {name: jnp.asarray(array, jnp.float32) for name, array in start.items()}
    state = optimizer.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(array, dtype=torch.float32)) for name, array in start.items()}
    torch_optimizer = torch.optim.AdamW(theirs.values(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    update = jax.jit(optimizer.update)
    for step in range(12):
        size = 10.0 ** -(step % 4)
        gradients = {name: (size * rng.normal(size=array.shape)).astype(np.float32) for name, array in start.items()}
        gradients["a"][0, 0, 0] = 0.0
        updates, state = update({name: jnp.asarray(g) for name, g in gradients.items()}, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        if norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), norm)
        torch_optimizer.param_groups[0]["lr"] = float(rates(step))
        torch_optimizer.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=2e-6, atol=2e-7)
