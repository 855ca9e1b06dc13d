"""Proof of a merge: reopen what was written and compare it with the base and with the adapter model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert.adapter import load_adapter
from convert.card import CARD
from convert.gptq import CONFIG_FILES, read_config
from convert.merged import load_merged
from convert.offset import OFFSET_FOLDER, lora_pair
from convert.peft_adapter import ADAPTER_WEIGHTS, PREFIX
from convert.tensors import quantized_weights
from lotaqaf_jax.errors import VerificationError
from lotaqaf_jax.kernels import LowRank, WeightAdapter, merge_adapter
from lotaqaf_jax.models import Decoder, adapted_linears
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.pretrained import default_dtype
from lotaqaf_jax.parallel import shard
from lotaqaf_jax.parallel.processes import fetch
from lotaqaf_jax.quant import QuantizedWeight, pack, unpack
from lotaqaf_jax.quant.folder import CheckpointFolder, read_header

__all__ = ["ModuleReport", "Report", "moves", "verify"]

_BLOCK = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """What a merge did to one quantised module.

    Attributes:
        name: its full name.
        integers: how many it has.
        moved: how many of them moved.
        largest_move: the largest |move|, in steps of the grid: 0 or 1.
        mean_offset: mean of |mu|, in steps; 0 without an offset.
    """

    name: str
    integers: int
    moved: int
    largest_move: int
    mean_offset: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`verify` found, all checks having passed; ``str()`` of it is a page to read.

    Attributes:
        modules: the quantised modules.
        identical_tensors: how many tensors are byte for byte those of the base.
        bytes_before: bytes of the base's tensors.
        bytes_after: bytes of the merged model's tensors.
        offset_bytes: bytes of the offset files beside it.
        tokens: how many positions' logits were compared with the adapter model's, 0 if no adapter was given.
    """

    modules: tuple[ModuleReport, ...]
    identical_tensors: int
    bytes_before: int
    bytes_after: int
    offset_bytes: int
    tokens: int

    @property
    def moved_share(self) -> float:
        """Share of all integers that moved."""
        return sum(module.moved for module in self.modules) / max(1, sum(module.integers for module in self.modules))

    @property
    def largest_move(self) -> int:
        """The largest |move| of any integer."""
        return max(module.largest_move for module in self.modules)

    @property
    def mean_offset(self) -> float:
        """Mean of |mu| over all modules, each by its number of integers."""
        total = sum(module.integers for module in self.modules)
        return sum(module.mean_offset * module.integers for module in self.modules) / max(1, total)

    def to_dict(self) -> dict[str, Any]:
        """The report for a JSON file."""
        derived = {"moved_share": self.moved_share, "largest_move": self.largest_move, "mean_offset": self.mean_offset}
        return derived | dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table over modules of one kind, and a line for each check."""
        kinds: dict[str, list[ModuleReport]] = {}
        for module in self.modules:
            kinds.setdefault(module.name.rsplit(".", 1)[-1], []).append(module)
        lines = ["module       integers       moved    share   max|move|  mean|mu|"]
        for kind, found in kinds.items():
            integers, moved = sum(m.integers for m in found), sum(m.moved for m in found)
            mu = sum(m.mean_offset * m.integers for m in found) / integers
            largest = max(m.largest_move for m in found)
            lines.append(f"{kind:10} {integers:>11,} {moved:>11,} {moved / integers:>8.3%} {largest:>10} {mu:>10.4f}")
        logits = "not compared (no adapter given)"
        if self.tokens:
            logits = f"bit-identical to the adapter model's at {self.tokens} positions"
        lines += [
            f"integers     {self.moved_share:.4%} moved, none by more than one step, all on the grid",
            f"others       {self.identical_tensors} tensors byte-identical to the base's",
            f"logits       {logits}",
            f"size         {_megabytes(self.bytes_before)} before, {_megabytes(self.bytes_after)} after"
            + (f", {_megabytes(self.offset_bytes)} of offsets beside it" if self.offset_bytes else ""),
        ]
        return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def verify(
    base: CheckpointFolder | str | Path,
    merged: str | Path,
    *,
    model: Decoder | None = None,
    adapter: str | Path | None = None,
    input_ids: np.ndarray | None = None,
    seed: int = 0,
    dtype: Any = None,
    progress: bool = True,
) -> Report:
    """Check a merged folder against its base and its adapter.

    * names, types, shapes and shards of the tensors are the base's, and all but ``qweight`` (in another format, the
      tensor of packed integers) are byte-identical;
    * every integer moved by at most one step and stayed in {0, ..., 2**bits - 1} (one that wrapped around would have
      moved by 2**bits - 1), and the unused bits of last words are as they were;
    * the configs differ only in ``meta.quantizer``; tokenizer and generation files are byte-identical;
    * with an adapter: words and mu are those that it makes of the base, and the reloaded model's logits are
      bit-identical to the adapter model's on the same path;
    * the LoRA beside it holds mu.

    Args:
        base: the base checkpoint.
        merged: the folder that was written.
        model: the adapter model: the base with its adapters, not merged.
        adapter: the folder of the adapter, instead of ``model``.
        input_ids: (batch, length) token ids to compare logits on; None for random ones.
        seed: seed of the random ones.
        dtype: type to compute in; None for that of ``model``, or the default.
        progress: show progress bars when it takes longer than a second.

    Returns:
        What was found.

    Raises:
        VerificationError: a check failed; names the tensor or file.
        CheckpointError: the folder cannot be opened.
        AdapterError: the adapter does not belong to the base.
    """
    if not isinstance(base, CheckpointFolder):
        base = CheckpointFolder(base)
    written = CheckpointFolder(merged)
    dtype = dtype or (model.dtype if model is not None else default_dtype())
    if model is None and adapter is not None:
        model = load_adapter(load_decoder(base, dtype, progress=progress), adapter, base=base, progress=progress)
    _check_layout(base, written)
    _check_files(base, written.path)
    identical = _check_others(base, written, progress)
    # On the mesh of the adapter model, since its logits are to be met bit for bit.
    where = None if model is None else model.sharding
    place = None if where is None else functools.partial(shard, mesh=where.mesh)
    reloaded = load_merged(merged, dtype=dtype, progress=progress, place=place)
    modules = tuple(_check_integers(base, written, reloaded, progress))
    _check_lora(reloaded, written.path / OFFSET_FOLDER)
    tokens = 0
    if model is not None:
        _check_merge(model, reloaded)
        tokens = _check_logits(model, reloaded, input_ids, seed)
    beside = written.path / OFFSET_FOLDER
    return Report(
        modules=modules,
        identical_tensors=identical,
        bytes_before=base.nbytes,
        bytes_after=written.nbytes,
        offset_bytes=sum(path.stat().st_size for path in beside.iterdir()) if beside.is_dir() else 0,
        tokens=tokens,
    )


def _failed(where: str, what: str) -> VerificationError:
    return VerificationError(f"{where}: {what}. The folder must not be used; export it again.")


def _check_layout(base: CheckpointFolder, written: CheckpointFolder) -> None:
    if base.stored.keys() != written.stored.keys():
        name = min(base.stored.keys() ^ written.stored.keys())
        raise _failed(f"{written.path}", f"tensor {name} is in only one of it and the base {base.path}")
    for name, entry in base.stored.items():
        there = written.stored[name]
        found = (there.file.name, there.dtype, there.shape, there.start)
        expected = (entry.file.name, entry.dtype, entry.shape, entry.start)
        if found != expected:
            raise _failed(name, f"found (shard, type, shape, place) {found} in {written.path}, the base has {expected}")


def _check_files(base: CheckpointFolder, written: Path) -> None:
    for name in CONFIG_FILES:
        if read_config(base.path, name) != read_config(written, name):
            raise _failed(f"{written / name}", "differs from the base's in more than meta.quantizer")
    signed = CONFIG_FILES if base.format == "gptq" else ()
    for path in sorted(written.iterdir()):
        if not path.is_file() or path.suffix == ".safetensors" or path.name in (*signed, CARD):
            continue
        if not (base.path / path.name).is_file() or path.read_bytes() != (base.path / path.name).read_bytes():
            raise _failed(f"{path}", f"is not the file of the base {base.path}")


def _check_others(base: CheckpointFolder, written: CheckpointFolder, progress: bool) -> int:
    words = {base.words_name(module) for module in base.quantized_modules}
    names = [name for name in base.stored if name not in words]
    total = sum(base.stored[name].nbytes for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="comparing", delay=1.0, disable=not progress) as bar:
        for name in names:
            ours, theirs = (folder.read_stored(name).reshape(-1).view(np.uint8) for folder in (written, base))
            for start in range(0, ours.size, _BLOCK):
                if not np.array_equal(ours[start : start + _BLOCK], theirs[start : start + _BLOCK]):
                    raise _failed(name, f"differs in {written.path} from the base, where only integers may change")
            bar.update(ours.size)
    return len(names)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compare(old: jax.Array, new: jax.Array, bits: int, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number of integers that moved, the largest |move|, and whether the unused bits of last words differ."""
    before, after = (unpack(words, bits, count, axis=-2) for words in (old, new))
    move = jnp.abs(after.astype(jnp.int32) - before.astype(jnp.int32))
    unused = [words ^ pack(values, bits, axis=-2) for words, values in ((old, before), (new, after))]
    return jnp.sum(move > 0), jnp.max(move), jnp.any(unused[0] != unused[1])


def moves(base: CheckpointFolder, model: Decoder) -> tuple[int, int, int]:
    """How a merged model's integers lie beside its base's: how many there are, how many moved, the largest |move|.

    Args:
        base: the checkpoint that the model was loaded from; of another one, nothing is found: 0, 0, 0.
        model: the merged decoder.
    """
    integers = moved = largest = 0
    for name, weight in quantized_weights(model):
        entry = base.tensors.get(f"{name}.qweight")
        if entry is None or entry.shape != weight.qweight.shape:
            return 0, 0, 0
        found = _compare(base.read(f"{name}.qweight"), fetch(weight.qweight), weight.bits, weight.shape[0])
        integers += weight.shape[0] * weight.shape[1]
        moved, largest = moved + int(found[0]), max(largest, int(found[1]))
    return integers, moved, largest


def _check_integers(
    base: CheckpointFolder, written: CheckpointFolder, reloaded: Decoder, progress: bool
) -> Iterator[ModuleReport]:
    count = len(base.quantized_modules)
    weights = tqdm(quantized_weights(reloaded), total=count, desc="comparing integers", delay=1.0, disable=not progress)
    for name, weight in weights:
        old, new = (folder.read(f"{name}.qweight") for folder in (base, written))
        moved, largest, padding = (x.item() for x in _compare(old, new, weight.bits, weight.shape[0]))
        if largest > 1:
            raise _failed(base.words_name(name), f"an integer moved by {largest} steps, where at most 1 is possible")
        if padding:
            raise _failed(base.words_name(name), "unused bits behind the last row changed")
        mu = 0.0 if weight.offset is None else float(jnp.mean(jnp.abs(weight.offset.astype(jnp.float32))))
        yield ModuleReport(name, weight.shape[0] * weight.shape[1], moved, largest, mu)


@jax.jit
def _merged(weight: QuantizedWeight, adapter: WeightAdapter) -> QuantizedWeight:
    return merge_adapter(weight, adapter, "xla")


def _check_merge(model: Decoder, reloaded: Decoder) -> None:
    """Words and mu are, module by module, those that the adapters make of the base."""
    adapters: dict[str, tuple[WeightAdapter, int]] = {}
    for names, _, adapter in adapted_linears(model):
        if isinstance(adapter, LowRank):
            raise VerificationError(f"{names[0]} has LoRA adapters, which no merged folder can hold. Pass no adapter.")
        adapters |= {name: (adapter, i) for i, name in enumerate(names)}
    if not adapters:
        raise VerificationError(
            "the model to verify against has no adapters; pass the adapter model, before its merge."
        )
    for (name, weight), (_, found) in zip(quantized_weights(model), quantized_weights(reloaded), strict=True):
        expected = weight
        if name in adapters:
            adapter, i = adapters[name]
            expected = _merged(weight, jax.tree.map(lambda stack, i=i: stack[i], adapter))
        if not np.array_equal(fetch(found.qweight), fetch(expected.qweight)):
            raise _failed(f"{name}.qweight", "is not what the adapter makes of the base")
        if (found.offset is None) != (expected.offset is None) or (
            expected.offset is not None
            and not np.array_equal(_bits(fetch(found.offset)), _bits(fetch(expected.offset)))
        ):
            raise _failed(f"{name}.offset", f"in {OFFSET_FOLDER} is not the mu that the adapter makes")


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check_lora(reloaded: Decoder, folder: Path) -> None:
    if not folder.is_dir():
        return
    entries = read_header(folder / ADAPTER_WEIGHTS)
    for name, weight in quantized_weights(reloaded):
        for part, index in (("lora_A", 0), ("lora_B", 1)):
            key = f"{PREFIX}{name}.{part}.weight"
            if key not in entries:
                raise _failed(f"{folder / ADAPTER_WEIGHTS}", f"tensor {key} is missing")
            entry = entries[key]
            found = np.memmap(entry.file, entry.dtype, "r", entry.start, entry.shape)
            if not np.array_equal(found, lora_pair(weight, entry.dtype)[index]):
                raise _failed(f"{folder / ADAPTER_WEIGHTS}", f"tensor {key} does not hold the scales times mu")


def _check_logits(model: Decoder, reloaded: Decoder, input_ids: np.ndarray | None, seed: int) -> int:
    if input_ids is None:
        length = min(32, model.config.max_position_embeddings)
        input_ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, length), dtype=np.int32)
    ids: Any = input_ids  # of the host: of several processes each has them
    expected, found = (fetch(m(ids)) for m in (model, reloaded))
    if not np.isfinite(expected).all():
        raise VerificationError(
            "the adapter model's own logits are not finite, so nothing can be compared. Train again."
        )
    if not np.array_equal(expected.view(np.uint32), found.view(np.uint32)):
        worst = float(np.max(np.abs(expected - found)))
        raise _failed("logits", f"the reloaded model's differ from the adapter model's by up to {worst:g}, expected 0")
    return int(np.prod(input_ids.shape))
