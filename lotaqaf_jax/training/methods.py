"""The methods of ``--method``: which adapters, which optimizer, and how a run says what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lotaqaf_jax.models import Decoder, add_adapters, add_lora, add_qalora
from lotaqaf_jax.optim import t_signsgd, ternary_adam
from lotaqaf_jax.thresholds import ramped_share
from lotaqaf_jax.training.adamw import adamw, learning_rates
from lotaqaf_jax.training.config import MethodName, TrainConfig

__all__ = ["METHODS", "Method", "method_of", "summary"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        adapt: (model, settings) -> the model with fresh adapters.
        optimizer: (settings, steps in all) -> the Optax transformation.
        adapters: (settings) -> what the adapters are, for people.
        optimization: (settings) -> the same of the optimizer.
        merges: whether the adapters can be merged into a GPTQ checkpoint.
        rates: (settings, steps in all) -> the learning rate by the steps done, or None where there is no such thing.
        share: (settings, steps in all) -> the share of integers that may move by step, or None where it is not given.
    """

    adapt: Callable[[Decoder, TrainConfig], Decoder]
    optimizer: Callable[[TrainConfig, int], optax.GradientTransformation]
    adapters: Callable[[TrainConfig], str]
    optimization: Callable[[TrainConfig], str]
    merges: bool = True
    rates: Callable[[TrainConfig, int], optax.Schedule | None] = lambda config, steps: None
    share: Callable[[TrainConfig, int], Callable[[jax.Array], jax.Array] | None] = lambda config, steps: None


def _add_ternary(model: Decoder, config: TrainConfig) -> Decoder:
    return add_adapters(
        model,
        rank=config.rank,
        omega=config.threshold,
        offset=config.offset_rule,
        target_modules=config.target_modules,
        seed=config.seed,
        offset_dtype=config.offset_dtype,
        float8=config.takes_float8,
        surrogate=config.gradient,
    )


def _add_lora(model: Decoder, config: TrainConfig) -> Decoder:
    return add_lora(model, config.rank, config.alpha, config.target_modules, seed=config.seed)


def _add_qalora(model: Decoder, config: TrainConfig) -> Decoder:
    return add_qalora(
        model,
        config.rank,
        config.alpha,
        config.target_modules,
        pool=config.qalora_pool,
        seed=config.seed,
        offset_dtype=config.offset_dtype,
    )


def _rates(config: TrainConfig, total_steps: int) -> optax.Schedule:
    return learning_rates(config.peak_rate, total_steps, scheduler=config.scheduler, warmup_ratio=config.warmup_ratio)


def _adamw(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    rates = _rates(config, total_steps)
    return adamw(rates, max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay)


def _ternary_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    if config.ternary_optimizer == "ternary_adam":
        return ternary_adam(_rates(config, total_steps))
    return t_signsgd(total_steps, config.sigma_schedule, beta=config.beta or None, stacked_axes=1)


def _ternary_rates(config: TrainConfig, total_steps: int) -> optax.Schedule | None:
    return _rates(config, total_steps) if config.ternary_optimizer == "ternary_adam" else None


def _ternary_share(config: TrainConfig, total_steps: int) -> Callable[[jax.Array], jax.Array] | None:
    share = config.share
    return None if share is None else lambda step: ramped_share(share, step, total_steps)


def _about_adapters(config: TrainConfig) -> str:
    threshold = f"omega {config.threshold:g}" if config.share is None else f"omega for {100 * config.share:g} % to move"
    offset = "no offset" if config.offset_rule == "none" else f"offset {config.offset_rule} in {config.offset_dtype}"
    return f"rank {config.rank}, {threshold}, {offset}"


def _about_ternary(config: TrainConfig) -> str:
    if config.ternary_optimizer == "ternary_adam":
        rule = f"ternary Adam, learning rate {config.peak_rate:g} {config.scheduler}{_about_warmup(config)}"
    else:
        rule = f"t-SignSGD, schedule {config.sigma_schedule}, beta {config.beta:g}"
    return f"{rule}, gradient {config.gradient}"


def _about_warmup(config: TrainConfig) -> str:
    return f" after {config.warmup_ratio:.3g} of the steps" if config.warmup_ratio else ""


def _about_adamw(config: TrainConfig) -> str:
    return (
        f"AdamW, learning rate {config.peak_rate:g} {config.scheduler}{_about_warmup(config)}, gradient norm up to "
        f"{config.max_grad_norm:g}, weight decay {config.weight_decay:g}"
    )


METHODS: dict[MethodName, Method] = {
    "lota": Method(
        adapt=_add_ternary,
        optimizer=_ternary_optimizer,
        adapters=_about_adapters,
        optimization=_about_ternary,
        rates=_ternary_rates,
        share=_ternary_share,
    ),
    "lora": Method(
        adapt=_add_lora,
        optimizer=_adamw,
        adapters=lambda config: f"LoRA of rank {config.rank}, alpha {config.alpha:g}",
        optimization=_about_adamw,
        merges=False,
        rates=_rates,
    ),
    "qalora": Method(
        adapt=_add_qalora,
        optimizer=_adamw,
        adapters=lambda config: (
            f"QA-LoRA of rank {config.rank}, alpha {config.alpha:g}, {config.qalora_pool} over groups, offset in "
            f"{config.offset_dtype}"
        ),
        optimization=_about_adamw,
        rates=_rates,
    ),
}


def method_of(config: TrainConfig) -> Method:
    """The method that a run is of."""
    return METHODS[config.method]


def _about_mesh(config: TrainConfig) -> str:
    data, fsdp, tensor = config.mesh_shape
    if data * fsdp * tensor == 1:
        return ""
    return f"devices      {data * fsdp * tensor}: data {data} x fsdp {fsdp} x tensor {tensor}\n"


def summary(config: TrainConfig, steps: int) -> str:
    """The settings that matter most, as lines to print; ``steps`` are those of ``num_train_epochs``."""
    steps = config.max_steps if config.max_steps > 0 else steps
    method = method_of(config)
    return (
        f"model        {config.model}\n"
        f"adapters     {method.adapters(config)}, on {' '.join(config.target_modules)}\n"
        f"optimizer    {method.optimization(config)}, {steps} steps of {config.train_batch_size} rows, "
        f"seed {config.seed}\n"
        f"{_about_mesh(config)}"
        f"computed in  {jnp.dtype(config.compute_dtype).name}"
        f"{', gradients of the weights from float8' if config.takes_float8 else ''}"
    )
