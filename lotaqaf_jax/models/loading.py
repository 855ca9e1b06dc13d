"""Checkpoint folder -> :class:`~lotaqaf_jax.models.decoder.Decoder`, a bounded number of bytes at a time.

Shapes are settled from the file headers before anything is read, and every problem found there is reported at once.
Then the tensors go from the memory-mapped files into their places in the layer stacks on the device: large ones one at
a time, small ones of several layers together, the next being read while one is copied, so that the host never holds
more than two large tensors or two fiftieths of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.decoder import Block, Decoder
from lotaqaf_jax.models.layers import Linear
from lotaqaf_jax.models.spec import DecoderSpec, LinearSpec, QuantSpec, dense_spec, projection_shapes
from lotaqaf_jax.quant.folder import PARTS, CheckpointFolder
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import group_count, trivial_g_idx
from lotaqaf_jax.quant.zeros import decode_zeros

__all__ = ["load_block", "load_decoder", "read_spec"]

# Buffers that some writers save, which are recomputed here from the config.
_IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


class _Problems:
    """Collects what is wrong with a checkpoint, to report it together."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder
        self.found: list[str] = []
        self.used: set[str] = set()

    def expect(self, name: str, shape: tuple[int, ...], kinds: tuple[Any, ...]) -> Any:
        """Check a tensor's presence, shape and type; return its type (the first of ``kinds`` where it is wrong)."""
        self.used.add(name)
        entry = self.folder.tensors.get(name)
        if entry is None:
            self.found.append(f"{name}: missing")
            return kinds[0]
        if entry.shape != shape:
            self.found.append(f"{name}: found shape {entry.shape}, expected {shape}")
        if entry.dtype not in kinds:
            wanted = " or ".join(jnp.dtype(kind).name for kind in kinds)
            self.found.append(f"{name}: found {entry.dtype}, expected {wanted}")
            return kinds[0]
        return entry.dtype

    def raise_if_any(self) -> None:
        if not self.found:
            return
        shown = "\n  ".join(self.found[:20])
        more = f"\n  ... and {len(self.found) - 20} more" if len(self.found) > 20 else ""
        raise CheckpointError(
            f"{self.folder.path}: {len(self.found)} tensors do not fit the config:\n  {shown}{more}\n"
            "Check that config.json belongs to these weights, and bits and group_size in its quantization_config."
        )


_FLOATS = tuple(jnp.dtype(kind) for kind in (jnp.float16, jnp.bfloat16, jnp.float32))
_INT32 = (jnp.dtype(jnp.int32),)


def read_spec(folder: CheckpointFolder, config: DecoderConfig) -> DecoderSpec:
    """Settle how every weight is held, from the config and the headers of the shards.

    Args:
        folder: the opened checkpoint.
        config: its decoder config.

    Raises:
        CheckpointError: lists every tensor that is missing, unexpected, or of the wrong shape or type.
    """
    problems = _Problems(folder)
    hidden = config.hidden_size
    embed_dtype = problems.expect("model.embed_tokens.weight", (config.vocab_size, hidden), _FLOATS)
    norm_dtype = problems.expect("model.norm.weight", (hidden,), _FLOATS)
    layers = []
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            # Stacked, they need one type: the one that holds every value of all.
            found = problems.expect(f"{prefix}.{norm}.weight", (hidden,), _FLOATS)
            norm_dtype = jnp.promote_types(norm_dtype, found)
        layers.append(
            tuple(
                (path, _linear_spec(problems, f"{prefix}.{path}", *shape))
                for path, shape in projection_shapes(config).items()
            )
        )
    head = None
    if not config.tie_word_embeddings or _has_own_head(folder):
        head = _linear_spec(problems, "lm_head", hidden, config.vocab_size, False)
    _check_unused(problems, config)
    problems.raise_if_any()
    return DecoderSpec(layers=tuple(layers), head=head, embed_dtype=embed_dtype, norm_dtype=norm_dtype)


def _linear_spec(problems: _Problems, name: str, n_in: int, n_out: int, bias: bool) -> LinearSpec:
    folder = problems.folder
    bias_dtype: Any = jnp.float16
    if bias:
        bias_dtype = problems.expect(f"{name}.bias", (n_out,), _FLOATS)
    if f"{name}.qweight" not in folder.tensors:
        dtype = problems.expect(f"{name}.weight", (n_out, n_in), _FLOATS)
        return LinearSpec(n_in, n_out, bias, None, dtype, bias_dtype)
    quant = folder.quantization.for_module(name) if folder.quantization else None
    if quant is None or folder.quantization is None:
        problems.used.update(f"{name}.{part}" for part in PARTS)
        problems.found.append(f"{name}.qweight: the quantisation config does not say how this module is quantised")
        return LinearSpec(n_in, n_out, bias, None, jnp.float16, bias_dtype)
    groups = group_count(n_in, quant.group_size)
    problems.expect(f"{name}.qweight", (packed_size(n_in, quant.bits), n_out), _INT32)
    problems.expect(f"{name}.qzeros", (groups, packed_size(n_out, quant.bits)), _INT32)
    dtype = problems.expect(f"{name}.scales", (groups, n_out), _FLOATS)
    act_order = False
    if f"{name}.g_idx" in folder.tensors:
        before = len(problems.found)
        problems.expect(f"{name}.g_idx", (n_in,), _INT32)
        if len(problems.found) == before:
            act_order = not np.array_equal(folder.read(f"{name}.g_idx"), trivial_g_idx(n_in, quant.group_size))
    spec = QuantSpec(quant.bits, quant.group_size, act_order, folder.quantization.checkpoint_format)
    return LinearSpec(n_in, n_out, bias, spec, dtype, bias_dtype)


def _has_own_head(folder: CheckpointFolder) -> bool:
    """Whether a model of tied embeddings brings a head that is not its embedding, which then counts."""
    if "lm_head.qweight" in folder.tensors:
        return True
    entries = [folder.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight")]
    if None in entries:
        return False
    head, embedding = folder.read("lm_head.weight"), folder.read("model.embed_tokens.weight")
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return True
    rows = range(0, len(head), 1024)  # in parts: comparing whole tables would make a table of the same length
    return not all(np.array_equal(head[i : i + 1024], embedding[i : i + 1024]) for i in rows)


def _check_unused(problems: _Problems, config: DecoderConfig) -> None:
    for name in sorted(problems.folder.tensors.keys() - problems.used):
        # A copy of the embedding: a head of its own has been used above.
        if name.endswith(_IGNORED) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        # Some GPTQ writers add a bias of zeros to every projection; it is no part of the architecture.
        if name.endswith(".bias") and not np.any(problems.folder.read(name)):
            continue
        problems.found.append(f"{name}: unexpected (no place for it in a {config.model_type} decoder)")


@functools.partial(jax.jit, donate_argnums=0)
def _place(stack: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, rows, index, 0)


_decode_zeros = jax.jit(decode_zeros, static_argnums=(1, 2, 3))


_Cut = tuple[slice, ...]
"""The part of an array that is wanted, by dimension; () for the whole."""

_Check = Callable[[np.ndarray, str], Any] | None


@dataclasses.dataclass(frozen=True)
class _Zeros:
    """Zero points (groups, out) from their packed words (groups, words)."""

    bits: int
    out: int
    checkpoint_format: str

    def words(self, cut: _Cut) -> _Cut:
        """The words that hold what ``cut`` wants."""
        start, stop = self._columns(cut)
        return (cut[0], slice(start * self.bits // 32, -(-stop * self.bits // 32))) if cut else ()

    def __call__(self, words: np.ndarray, cut: _Cut) -> jax.Array:
        """(..., groups, words) -> (..., groups, out wanted) uint8."""
        start, stop = self._columns(cut)
        found = _decode_zeros(words, self.bits, stop - start, self.checkpoint_format)
        if not cut:
            return found
        columns = cut[1]
        first = (columns.start or 0) - start
        return found[..., first : first + _length((self.out,), (columns,))[0]]

    def _columns(self, cut: _Cut) -> tuple[int, int]:
        """The columns that are read: words begin every 32 columns in any width."""
        if not cut:
            return 0, self.out
        start, stop, _ = cut[1].indices(self.out)
        return start // 32 * 32, min(-(-stop // 32) * 32, self.out)


_THREADS = 8
_SHARE = 2**22


def _copy(target: np.ndarray, source: np.ndarray, threads: ThreadPoolExecutor | None) -> None:
    """target[...] = source, in ``_THREADS`` parts at once, unless small: one thread reads a file's pages at 2 GB/s."""
    if threads is None or source.nbytes < 2 * _SHARE or source.ndim == 0:
        target[...] = source
        return
    parts = min(_THREADS, source.nbytes // _SHARE, len(source))
    edges = [len(source) * i // parts for i in range(parts + 1)]

    def one(i: int) -> None:
        target[edges[i] : edges[i + 1]] = source[edges[i] : edges[i + 1]]

    for _ in threads.map(one, range(parts)):
        pass


class _Reader:
    """Reads tensors and stacks of them, and counts the bytes."""

    def __init__(
        self, folder: CheckpointFolder, count: Callable[[int], Any], threads: ThreadPoolExecutor | None = None
    ) -> None:
        self.folder = folder
        self.count = count
        self.threads = threads
        # Small against the model and, for a very large one, against a host.
        self.most = min(folder.nbytes // 50, 2**27)

    def array(self, name: str, cut: _Cut = ()) -> np.ndarray:
        """A tensor, or a part of it, of which no more is read than its pages of the file."""
        array = self.folder.read(name)[cut]
        self.count(array.nbytes)
        return array

    def one(self, name: str, like: Any, check: _Check = None, decode: _Zeros | None = None) -> jax.Array:
        """A tensor of the shape, type and place of ``like``."""

        def part(cut: _Cut) -> jax.Array:
            array = self.array(name, cut if decode is None else decode.words(cut))
            if check is not None:
                check(array, name)
            # Copied, since a CPU array may otherwise be a view of the file, which another process can overwrite.
            return jnp.array(array, like.dtype) if decode is None else decode(array, cut)

        return _on_devices(like, part)

    def stack(self, names: list[str], like: Any, check: _Check = None, decode: _Zeros | None = None) -> jax.Array:
        """The tensors ``names`` as one (len(names), ...) of the shape, type and place of ``like``."""
        return _on_devices(like, lambda cut: self._stack(names, like, cut[1:], check, decode))

    def _stack(self, names: list[str], like: Any, cut: _Cut, check: _Check, decode: _Zeros | None) -> jax.Array:
        """The part of one device.

        A stack of at most ``most`` bytes is put together on the host: that is one copy to the device, and no program
        is compiled for its shape. A longer one is filled on the device, in equal parts of at most ``most`` bytes or of
        one tensor.
        """
        shape = _length(like.shape[1:], cut)
        size = jnp.dtype(like.dtype).itemsize * int(np.prod(shape))
        count = len(names)
        rows = max(n for n in range(1, count + 1) if n == 1 or (n * size <= self.most and count % n == 0))
        if rows == count:
            whole = self._rows(names, like.dtype, cut, check, decode)
            return jax.block_until_ready(whole if decode else jax.device_put(whole))
        stack = jnp.zeros((count, *shape), like.dtype)
        for i in range(0, count, rows):
            part = self._rows(names[i : i + rows], like.dtype, cut, check, decode)
            # The part before is copied to the device while this one is read, and then waited for: on a busy machine the
            # host would otherwise run ahead of the copies and hold many parts at once.
            stack = _place(stack.block_until_ready(), part, i)
        return stack.block_until_ready()

    def _rows(self, names: list[str], dtype: Any, cut: _Cut, check: _Check, decode: _Zeros | None) -> Any:
        """Tensors put together on the host, or decoded on the device."""
        found = None
        for i, name in enumerate(names):
            array = self.array(name, cut if decode is None else decode.words(cut))
            if check is not None:
                check(array, name)
            if found is None:
                # No view of the file: a CPU array may share its memory, and another process can overwrite the file.
                found = np.empty((len(names), *array.shape), array.dtype if decode else dtype)
            _copy(found[i], array, self.threads)
        return found if decode is None or found is None else decode(found, cut)


def _length(shape: tuple[int, ...], cut: _Cut) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(len(range(*part.indices(size))) for part, size in zip(cut, shape, strict=True)) if cut else shape


def _on_devices(like: Any, part: Callable[[_Cut], jax.Array]) -> jax.Array:
    """An array of the shape and place of ``like`` from the parts that this process's devices hold, each read once."""
    if like.sharding is None:
        return part(())
    found: dict[Any, jax.Array] = {}
    arrays = []
    for device, cut in like.sharding.addressable_devices_indices_map(like.shape).items():
        key = tuple((one.start, one.stop) for one in cut)
        if key not in found:
            with jax.default_device(device):
                found[key] = jax.device_put(part(cut), device)
        arrays.append(jax.device_put(found[key], device))
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)


def load_decoder(
    folder: CheckpointFolder,
    dtype: Any = jnp.float32,
    *,
    progress: bool = True,
    place: Callable[[Decoder], Decoder] | None = None,
) -> Decoder:
    """Read a checkpoint into a decoder. Packed words go to the device as they are.

    Args:
        folder: the opened checkpoint, quantised or 16-bit.
        dtype: the type that activations and dequantised weights are computed in.
        progress: show a progress bar when it takes longer than a second.
        place: gives an abstract decoder's arrays shardings (:func:`lotaqaf_jax.parallel.shard`). No more is then read
            than what this process's devices hold. None for one device.

    Returns:
        The decoder, with every weight in its stored type.

    Raises:
        ConfigError: a config that is not supported.
        CheckpointError: tensors that are missing, unexpected, damaged or of the wrong shape; NaN or infinite scales.
    """
    config = DecoderConfig.from_hf(folder.config)
    spec = read_spec(folder, config)
    decoder = nnx.eval_shape(lambda: Decoder(config, spec, dtype))
    if place is not None:
        decoder = place(decoder)
    total = sum(entry.nbytes for entry in folder.tensors.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1.0, disable=not progress)
    with bar, ThreadPoolExecutor(_THREADS) as threads:
        reader = _Reader(folder, bar.update, threads)
        for name, variable in (("embed_tokens", decoder.embed_tokens.weight), ("norm", decoder.norm.weight)):
            variable.set_value(reader.one(f"model.{name}.weight", variable.get_value()))
        for segment, (start, count) in zip(decoder.segments, spec.runs(), strict=True):
            prefixes = [f"model.layers.{i}" for i in range(start, start + count)]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names = [f"{prefix}.{norm}.weight" for prefix in prefixes]
                variable = getattr(segment, norm).weight
                variable.set_value(reader.stack(names, variable.get_value()))
            for path, linear_spec in spec.layers[start]:
                _fill(segment.linear(path), linear_spec, [f"{prefix}.{path}" for prefix in prefixes], reader)
        if decoder.lm_head is not None and spec.head is not None:
            _fill(decoder.lm_head, spec.head, ["lm_head"], reader, stacked=False)
    for note in folder.notes:
        warnings.warn(note, stacklevel=2)
    return decoder


def load_block(folder: CheckpointFolder, config: DecoderConfig, index: int, dtype: Any) -> Block:
    """Read one layer of a 16-bit checkpoint, for work that never holds a whole model.

    Args:
        folder: the opened checkpoint, in which :func:`read_spec` found nothing wrong.
        config: its decoder config.
        index: which layer.
        dtype: the type of its weights on the device; norms are float32.

    Returns:
        The layer, its arrays without a leading axis.
    """
    layer = dict(dense_spec(config, dtype).layers[index])
    block = nnx.eval_shape(lambda: Block(config, layer, jnp.float32))
    prefix = f"model.layers.{index}"
    reader = _Reader(folder, lambda _: None)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        getattr(block, norm).weight.set_value(jnp.array(reader.array(f"{prefix}.{norm}.weight"), jnp.float32))
    for path, spec in layer.items():
        _fill(block.linear(path), spec, [f"{prefix}.{path}"], reader, stacked=False)
    return block


def _fill(linear: Linear, spec: LinearSpec, names: list[str], reader: _Reader, *, stacked: bool = True) -> None:
    """Give a linear layer its arrays, those of several layers stacked, or those of the one in ``names``."""

    def fill(part: str, like: Any, check: _Check = None, decode: _Zeros | None = None) -> jax.Array:
        if stacked:
            return reader.stack([f"{name}.{part}" for name in names], like, check, decode)
        return reader.one(f"{names[0]}.{part}", like, check, decode)

    if linear.bias is not None:
        linear.bias.set_value(fill("bias", linear.bias.get_value()))
    quant = spec.quant
    if quant is None:
        linear.weight.set_value(fill("weight", linear.weight.get_value()))
        return
    groups = group_count(spec.in_features, quant.group_size)

    def in_range(g_idx: np.ndarray, name: str) -> None:
        _check_range(g_idx, groups, name)

    like = linear.packed
    linear.weight.set_value(
        dataclasses.replace(
            like,
            qweight=fill("qweight", like.qweight),
            scales=fill("scales", like.scales, check=_check_finite),
            zeros=fill("qzeros", like.zeros, decode=_Zeros(quant.bits, spec.out_features, quant.checkpoint_format)),
            g_idx=None if like.g_idx is None else fill("g_idx", like.g_idx, check=in_range),
        )
    )


def _check_finite(scales: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(scales.astype(np.float32))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{name}: {np.count_nonzero(bad)} of {bad.size} scales are NaN or infinite, the first at {place}. "
            "The checkpoint is damaged or its quantisation overflowed; download or quantise it again."
        )


def _check_range(g_idx: np.ndarray, groups: int, name: str) -> None:
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{name}: groups run from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}. "
            "Check group_size in the quantisation config."
        )
