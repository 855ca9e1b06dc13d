"""LoTA-QAF on JAX and Flax: fine-tune a GPTQ model with ternary adapters, merge them without rounding.

>>> import lotaqaf_jax
>>> model = lotaqaf_jax.load_pretrained("folder/of/a/gptq/checkpoint")  # doctest: +SKIP
>>> model = lotaqaf_jax.add_adapters(model, rank=64, omega=48)  # doctest: +SKIP
>>> merged = lotaqaf_jax.merge(model)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lotaqaf_jax.models import add_adapters, load_pretrained, merge

__version__ = "0.1.0"
__all__ = ["__version__", "add_adapters", "load_pretrained", "merge"]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that `import lotaqaf_jax.optim` does not load the models.
    if name in ("add_adapters", "load_pretrained", "merge"):
        from lotaqaf_jax import models

        return getattr(models, name)
    raise AttributeError(f"module 'lotaqaf_jax' has no attribute {name!r}")
