"""A plan: memory and time of a step together, the fastest that fits, and what would fit where nothing does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models.decoder import Recompute
from lotaqaf_jax.plan.hardware import Gpu
from lotaqaf_jax.plan.memory import Memory, memory_of
from lotaqaf_jax.plan.seconds import Seconds, seconds_of
from lotaqaf_jax.plan.sizes import ONE_DEVICE, Layout, Settings, Shape

__all__ = ["MEMORY_FRACTION", "Fit", "Plan", "Space", "estimate", "fastest", "fitting", "layouts"]

MEMORY_FRACTION = 0.92
"""Of a card's memory that XLA is given, by XLA_PYTHON_CLIENT_MEM_FRACTION; without it, XLA takes 0.75."""

CLOSE = 0.03
"""Share by which times are taken to be equal: what the same step differs by from day to day (docs/benchmarks.md)."""

LEAST_RANK, LEAST_LENGTH = 8, 128
"""Below these nothing is suggested."""

_LEANER: dict[Recompute, tuple[Recompute, ...]] = {"none": ("products", "block"), "products": ("block",), "block": ()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to train: the model, the card, the layout, the settings, and what they come to. ``limit`` is the memory
    of a device that may be used, in bytes."""

    shape: Shape
    gpu: Gpu
    layout: Layout
    settings: Settings
    memory: Memory
    seconds: Seconds
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, the reserve included."""
        return self.memory.total <= self.limit

    @property
    def rows(self) -> int:
        """Rows of an update, over all devices."""
        return self.settings.batch * self.settings.accumulate * self.layout.replicas

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, padding counted."""
        return self.rows * self.settings.length / self.seconds.total

    @property
    def steps_per_day(self) -> float:
        """Updates in 24 hours."""
        return 86400 / self.seconds.total

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, in plain numbers and strings."""
        return {
            "gpu": self.gpu.name,
            "layout": dataclasses.asdict(self.layout),
            "settings": dataclasses.asdict(self.settings),
            "memory_bytes": dict(self.memory.parts()) | {"total": self.memory.total, "limit": round(self.limit)},
            "peak": self.memory.peak.name,
            "seconds": dict(self.seconds.parts()) | {"total": self.seconds.total},
            "rows": self.rows,
            "tokens_per_second": self.tokens_per_second,
            "steps_per_day": self.steps_per_day,
            "fits": self.fits,
            "measured_card": self.gpu.measured and self.layout.count == 1,
        }


def estimate(
    shape: Shape,
    gpu: Gpu,
    settings: Settings,
    layout: Layout = ONE_DEVICE,
    *,
    memory_fraction: float = MEMORY_FRACTION,
) -> Plan:
    """Memory and time of a step.

    Args:
        shape: the model, of :func:`lotaqaf_jax.plan.shape_of`.
        gpu: the card.
        settings: of the step.
        layout: how it is spread over cards.
        memory_fraction: share of the card's memory that may be used, in (0, 1].

    Raises:
        ConfigError: a share out of range, or a model that cannot be split so.
    """
    if not 0 < memory_fraction <= 1:
        raise ConfigError(f"--memory_fraction: found {memory_fraction}, expected 0 < memory_fraction <= 1.")
    memory, seconds = memory_of(shape, settings, layout), seconds_of(shape, gpu, settings, layout)
    return Plan(shape, gpu, layout, settings, memory, seconds, memory_fraction * gpu.memory)


@dataclasses.dataclass(frozen=True)
class Space:
    """What :func:`fastest` may choose among; a field of one value is fixed. ``data``, ``fsdp`` and ``tensor`` are None
    where they are free."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    recomputes: tuple[Recompute, ...] = ("products", "block")
    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None


def layouts(shape: Shape, gpu: Gpu, count: int, space: Space = Space()) -> Iterator[Layout]:
    """Every layout of ``count`` devices that the model can be split in, with tensor within a host.

    Raises:
        ConfigError: there is none.
    """
    found = False
    problem: ConfigError | None = None
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            layout = Layout(count // tensor // fsdp, fsdp, tensor)
            wanted = all(getattr(space, name) in (None, getattr(layout, name)) for name in ("data", "fsdp", "tensor"))
            if not wanted or (tensor > gpu.host and space.tensor is None):
                continue
            try:
                layout.check(shape)
            except ConfigError as refused:
                problem = refused
                continue
            found = True
            yield layout
    if not found:
        raise problem or ConfigError(
            f"--count: found {count}, expected data * fsdp * tensor, which are "
            f"{' * '.join(str(getattr(space, name) or 'any') for name in ('data', 'fsdp', 'tensor'))}."
        )


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def fastest(
    shape: Shape,
    gpu: Gpu,
    count: int,
    settings: Settings,
    *,
    rows: int,
    space: Space = Space(),
    memory_fraction: float = MEMORY_FRACTION,
) -> tuple[Plan, bool]:
    """The plan for ``count`` devices with most tokens a second among those that fit; of those as fast but for a share
    :data:`CLOSE`, the one with the least tensor, of whose waiting least is known, and then the least memory. If none
    fits, the one that takes least memory.

    Args:
        shape: the model.
        gpu: the card.
        count: cards.
        settings: those that are not chosen here.
        rows: of an update; batches are summed up to make them, so that devices * batch has to divide them. Where no
            batch does, a device computes one row.
        space: what to choose among.
        memory_fraction: as :func:`estimate`.

    Returns:
        The plan, and whether it fits.

    Raises:
        ConfigError: no layout of so many devices.
    """
    fit: list[Plan] = []
    leanest: tuple[int, Layout, Settings] | None = None
    for layout in layouts(shape, gpu, count, space):
        for batch in _batches(space.batches, rows, layout.replicas):
            accumulate = max(1, rows // (batch * layout.replicas))
            for way in space.recomputes:
                tried = dataclasses.replace(settings, batch=batch, accumulate=accumulate, recompute=way)
                needed = memory_of(shape, tried, layout).total
                if leanest is None or needed < leanest[0]:
                    leanest = needed, layout, tried
                if needed <= memory_fraction * gpu.memory:
                    fit.append(estimate(shape, gpu, tried, layout, memory_fraction=memory_fraction))
    if fit:
        most = max(plan.tokens_per_second for plan in fit)
        close = [plan for plan in fit if plan.tokens_per_second >= (1 - CLOSE) * most]
        return min(close, key=lambda plan: (plan.layout.tensor, plan.memory.total)), True
    assert leanest is not None  # there is a layout, and a batch for it
    return estimate(shape, gpu, leanest[2], leanest[1], memory_fraction=memory_fraction), False


def _batches(batches: Sequence[int], rows: int, replicas: int) -> Sequence[int]:
    whole = [batch for batch in batches if rows % (batch * replicas) == 0]
    return whole or [min(batches)]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings that fit, and how they differ from those that did not: ``changes`` holds (name, value) of fields of
    :class:`Settings` and :class:`Layout`."""

    settings: Settings
    layout: Layout
    changes: tuple[tuple[str, Any], ...]


def fitting(shape: Shape, settings: Settings, layout: Layout, limit: float, *, gpus_a_host: int = 8) -> Fit | None:
    """The settings nearest to those given that fit, for whoever is told that these do not.

    Tried in the order of what they cost, each as far as it goes before the next: to recompute more; fewer rows at once,
    with more batches summed up for the same update; weights split over devices that had copies (fsdp), then over
    devices that share rows (tensor); half the rank, and again; half the length, and again.

    Args:
        shape: the model.
        settings: those that do not fit.
        layout: likewise; the number of devices stays.
        limit: bytes of a device.
        gpus_a_host: the most that tensor may be.

    Returns:
        What fits, or None. Settings that fit come back as they are.

    Raises:
        ConfigError: the model cannot be split as ``layout`` says.
    """
    now = (layout, settings)
    if memory_of(shape, settings, layout).total <= limit:
        return Fit(settings, layout, ())
    for way in (_more_recomputing, _fewer_rows, _more_fsdp, _more_tensor, _less_rank, _less_length):
        for tried in way(*now):
            if tried[0].tensor > max(gpus_a_host, layout.tensor):
                continue
            try:
                needed = memory_of(shape, tried[1], tried[0]).total
            except ConfigError:
                continue  # cannot be split so
            now = tried
            if needed <= limit:
                return Fit(now[1], now[0], tuple(_differences((settings, layout), (now[1], now[0]))))
    return None


_Ways = Iterator[tuple[Layout, Settings]]


def _more_recomputing(layout: Layout, settings: Settings) -> _Ways:
    for way in _LEANER[settings.recompute]:
        yield layout, dataclasses.replace(settings, recompute=way)


def _fewer_rows(layout: Layout, settings: Settings) -> _Ways:
    for batch in reversed(_divisors(settings.batch)[:-1]):
        accumulate = settings.accumulate * settings.batch // batch
        yield layout, dataclasses.replace(settings, batch=batch, accumulate=accumulate)


def _more_fsdp(layout: Layout, settings: Settings) -> _Ways:
    for more in _divisors(layout.data)[1:]:
        yield dataclasses.replace(layout, data=layout.data // more, fsdp=layout.fsdp * more), settings


def _more_tensor(layout: Layout, settings: Settings) -> _Ways:
    for more in _divisors(layout.fsdp)[1:]:
        split = dataclasses.replace(layout, fsdp=layout.fsdp // more, tensor=layout.tensor * more)
        yield split, dataclasses.replace(settings, accumulate=settings.accumulate * more)


def _less_rank(layout: Layout, settings: Settings) -> _Ways:
    rank = settings.rank // 2
    while rank >= LEAST_RANK:
        yield layout, dataclasses.replace(settings, rank=rank)
        rank //= 2


def _less_length(layout: Layout, settings: Settings) -> _Ways:
    length = settings.length // 2
    while length >= LEAST_LENGTH:
        yield layout, dataclasses.replace(settings, length=length)
        length //= 2


def _differences(then: Sequence[Any], now: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for old, new in zip(then, now, strict=True):
        for field in dataclasses.fields(old):
            if getattr(old, field.name) != getattr(new, field.name):
                yield field.name, getattr(new, field.name)
