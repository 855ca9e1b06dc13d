"""Cards, as their data sheets have them, and the shares of those figures that training reaches."""

from __future__ import annotations

import dataclasses

from lotaqaf_jax.errors import ConfigError

__all__ = ["GPUS", "Gpu", "gpu", "gpu_of_kind"]

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card and its links.

    Attributes:
        name: what ``--gpu`` calls it.
        memory: bytes, as nvidia-smi tells them.
        flops: products of bfloat16 numbers, dense, float32 sums, operations a second.
        flops8: the same of float8 numbers, on the cards where training uses them (Hopper and later), else None.
        bandwidth: of its memory, bytes a second.
        link: to another card of the host, bytes a second in one direction.
        network: to another host, bytes a second in one direction, for each card.
        host: cards in a host.
        kind: part of the name that JAX gives the device (``device_kind``).
        measured: whether steps were timed on it; times for others are scaled by the data sheets.
    """

    name: str
    memory: float
    flops: float
    flops8: float | None
    bandwidth: float
    link: float
    network: float
    host: int = 8
    kind: str = ""
    measured: bool = False


# Sources: NVIDIA's data sheets of the SXM cards, L40S and RTX 4090; the peaks without sparsity. Networks are those of
# NVIDIA's reference systems: 8 adapters of 200 Gbit/s (DGX A100) or 400 Gbit/s (DGX H100, H200, B200) for 8 cards; for
# cards on PCIe 4.0, 100 Gbit/s a card, an assumption.
_MIB = 2.0**20
GPUS: dict[str, Gpu] = {
    card.name: card
    for card in (
        Gpu("a100-40", 40960 * _MIB, 312e12, None, 1.555e12, 300e9, 25e9, kind="A100-SXM4-40GB"),
        Gpu("a100-80", 81920 * _MIB, 312e12, None, 2.039e12, 300e9, 25e9, kind="A100-SXM4-80GB"),
        Gpu("h100", 81559 * _MIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, kind="H100 80GB"),
        Gpu("h200", 143771 * _MIB, 989e12, 1979e12, 4.8e12, 450e9, 50e9, kind="H200", measured=True),
        Gpu("b200", 183359 * _MIB, 2250e12, 4500e12, 8.0e12, 900e9, 50e9, kind="B200"),
        Gpu("l40s", 46068 * _MIB, 362e12, None, 0.864e12, 32e9, 12.5e9, kind="L40S"),
        Gpu("rtx4090", 24564 * _MIB, 165e12, None, 1.008e12, 32e9, 12.5e9, kind="RTX 4090"),
    )
}


def gpu(name: str) -> Gpu:
    """The card called ``name``, in any case.

    Raises:
        ConfigError: an unknown name; lists the known ones.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu: found {name!r}, expected one of: {', '.join(GPUS)}.")
    return found


def gpu_of_kind(kind: str) -> Gpu | None:
    """The card that JAX calls ``kind`` (``device_kind``), or None where it is not known."""
    return next((card for card in GPUS.values() if card.kind in kind), None)
