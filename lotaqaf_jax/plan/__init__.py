"""Memory and time of a training step, on paper, before a card is asked for: ``python -m lotaqaf_jax.plan``."""

from lotaqaf_jax.plan.check import about_run, check_fits
from lotaqaf_jax.plan.estimate import MEMORY_FRACTION, Fit, Plan, Space, estimate, fastest, fitting, layouts
from lotaqaf_jax.plan.hardware import GPUS, Gpu, gpu, gpu_of_kind
from lotaqaf_jax.plan.memory import Held, Memory, Phase, held_bytes, memory_of, saved_bytes
from lotaqaf_jax.plan.seconds import Seconds, seconds_of
from lotaqaf_jax.plan.sizes import Layout, Settings, Shape, shape_of

__all__ = [
    "GPUS",
    "MEMORY_FRACTION",
    "Fit",
    "Gpu",
    "Held",
    "Layout",
    "Memory",
    "Phase",
    "Plan",
    "Seconds",
    "Settings",
    "Shape",
    "Space",
    "about_run",
    "check_fits",
    "estimate",
    "fastest",
    "fitting",
    "gpu",
    "gpu_of_kind",
    "held_bytes",
    "layouts",
    "memory_of",
    "saved_bytes",
    "seconds_of",
    "shape_of",
]
