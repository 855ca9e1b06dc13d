"""A decoder on a mesh: logits, losses and training of one device, up to the order of sums."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.assets import DEFAULT_MODEL
from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.generation import generate
from lotaqaf_jax.models import Decoder, add_adapters, add_lora, add_qalora, count_moves, load_pretrained, merge
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.optim import t_signsgd, ternary_adam
from lotaqaf_jax.parallel import make_mesh, put_rows, shard, whole
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.training.adamw import adamw
from lotaqaf_jax.training.loss import score_tokens
from lotaqaf_jax.training.step import TrainState, make_train_step, split_model

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
MODELS = {
    "qwen2, tied": DEFAULT_MODEL,
    "llama, act-order, untied": CHECKPOINTS / "ckpt-llama-b4g32-asym-desc",
    "qwen2, partly 16 bit": CHECKPOINTS / "ckpt-qwen2-b8g64-sym-partial",
}
MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4)]


@functools.cache
def loaded(name: str) -> Decoder:
    return load_pretrained(MODELS[name], dtype=jnp.float32, progress=False)


def batch_of(vocab: int, rows: int = 8, length: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.3, IGNORE, ids)
    labels[:, 0] = IGNORE
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return {"input_ids": ids, "labels": labels, "positions": positions, "segment_ids": np.ones_like(ids)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_scores_are_those_of_one_device(name: str, mesh: tuple[int, int, int]) -> None:
    model = loaded(name)
    there = shard(model, make_mesh(*mesh))
    batch = batch_of(model.config.vocab_size)

    @functools.partial(jax.jit, static_argnums=0)
    def scored(graph: nnx.GraphDef, state: nnx.State, batch: dict[str, jax.Array]) -> Any:
        model = nnx.merge(graph, state)
        names = ("input_ids", "labels", "positions", "segment_ids")
        return model.head(model.hidden_states(batch["input_ids"])), score_tokens(model, *(batch[n] for n in names))

    want, found = (scored(*nnx.split(one), put_rows(one, batch)) for one in (model, there))
    np.testing.assert_allclose(found[0], want[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1].loss, want[1].loss, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[1].counted, want[1].counted)
    np.testing.assert_array_equal(found[1].correct, want[1].correct)


TARGETS = ("q_proj", "down_proj")  # cut by columns and, without act-order, by rows
ternary = functools.partial(add_adapters, rank=8, omega=2, target_modules=TARGETS)
windowed = functools.partial(ternary, offset="none", surrogate="window")
qalora = functools.partial(add_qalora, rank=8, target_modules=TARGETS)
lora = functools.partial(add_lora, rank=8, target_modules=TARGETS)
adam = functools.partial(adamw, lambda t: 1e-2, max_grad_norm=0.3)
METHODS: dict[str, Any] = {
    "ternary adam": (windowed, lambda: ternary_adam(0.3), lambda t: jnp.float32(0.1)),
    "t-signsgd": (ternary, lambda: t_signsgd(3, stacked_axes=1), None),
    "qa-lora": (qalora, adam, None),
    "lora": (lora, adam, None),
}


@pytest.mark.parametrize(
    ("method", "name", "mesh"),
    [
        ("ternary adam", "qwen2, tied", (2, 2, 2)),
        ("t-signsgd", "llama, act-order, untied", (1, 4, 2)),
        ("qa-lora", "qwen2, tied", (1, 2, 4)),
        ("lora", "qwen2, partly 16 bit", (2, 2, 2)),
    ],
)
def test_training_goes_as_on_one_device(method: str, name: str, mesh: tuple[int, int, int]) -> None:
    adapt, optimizer, share = METHODS[method]
    batch = batch_of(loaded(name).config.vocab_size)

    def trained(model: Decoder) -> tuple[Decoder, TrainState, Any]:
        model = adapt(model)
        graph, adapters, frozen = split_model(model)
        adapters = jax.tree.map(jnp.copy, adapters)
        state = TrainState(adapters, optimizer().init(adapters), jnp.int32(0))
        state = state if model.sharding is None else whole(state, model.sharding.mesh)
        step = make_train_step(graph, optimizer(), accumulate=2, recompute="block", share=share, placed=state)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        for _ in range(2):
            state, metrics = step(state, frozen, put_rows(model, batch))
        if model.sharding is not None:
            same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, before)
            assert all(jax.tree.leaves(same)), "the state stays where it was"
        return nnx.merge(graph, state.adapters, frozen), state, metrics

    here, there = loaded(name), shard(loaded(name), make_mesh(*mesh))
    (model, want, metrics), (other, found, theirs) = trained(here), trained(there)
    np.testing.assert_allclose(theirs.loss, metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(theirs.grad_norm, metrics.grad_norm, rtol=1e-4)
    assert theirs.tokens == metrics.tokens
    for one, two in zip(jax.tree.leaves(want.adapters), jax.tree.leaves(found.adapters), strict=True):
        if one.dtype == jnp.int8:  # A sum in another order may decide a tie otherwise.
            assert np.mean(np.asarray(one) == np.asarray(two)) > 0.999
        else:
            np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)
    if method != "lora":
        merged = merge(other)
        ids = put_rows(other, batch)["input_ids"]
        np.testing.assert_array_equal(merged(ids), other(ids), "nothing is rounded")
        moves = [sum(float(moved.sum()) for moved, _ in count_moves(one)) for one in (model, other)]
        assert moves[1] == pytest.approx(moves[0], rel=1e-2)


@pytest.mark.parametrize("beta", [None, 0.9])
def test_t_signsgd_looks_at_whole_tensors_not_at_parts(beta: float | None) -> None:
    rng = np.random.default_rng(0)
    params = {"A": np.zeros((3, 64, 8), np.int8), "B": np.zeros((3, 8, 64), np.int8)}
    mesh = make_mesh(1, 4, 2)
    places = {
        "A": jax.NamedSharding(mesh, jax.P(None, ("tensor", "fsdp"), None)),
        "B": jax.NamedSharding(mesh, jax.P(None, None, ("tensor", "fsdp"))),
    }
    optimizer = t_signsgd(8, beta=beta, stacked_axes=1)
    update = jax.jit(optimizer.update)
    here, there = jax.tree.map(jnp.asarray, params), jax.device_put(params, places)
    states = [optimizer.init(here), optimizer.init(there)]
    for _ in range(8):
        grads = {name: rng.normal(size=array.shape).astype(np.float32) ** 3 for name, array in params.items()}
        one, states[0] = update(grads, states[0], here)
        two, states[1] = update(jax.device_put(grads, places), states[1], there)
        for name in params:
            np.testing.assert_array_equal(one[name], two[name])
        here, there = (jax.tree.map(jnp.add, p, u) for p, u in ((here, one), (there, two)))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(here))


@pytest.mark.parametrize("name", MODELS)
def test_loading_onto_a_mesh_reads_each_part_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lotaqaf_jax.models import loading

    mesh = make_mesh(2, 2, 2)
    want = shard(loaded(name), mesh)
    read: list[tuple[str, int]] = []
    before = loading._Reader.array

    def counted(self: Any, tensor: str, cut: Any = ()) -> np.ndarray:
        found = before(self, tensor, cut)
        read.append((tensor, found.nbytes))
        return found

    monkeypatch.setattr(loading._Reader, "array", counted)
    folder = CheckpointFolder(MODELS[name])
    found = load_decoder(folder, jnp.float32, progress=False, place=functools.partial(shard, mesh=mesh))
    for one, two in zip(jax.tree.leaves(nnx.state(want)), jax.tree.leaves(nnx.state(found)), strict=True):
        assert one.sharding == two.sharding
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    assert nnx.graphdef(want) == nnx.graphdef(found)
    total: dict[str, int] = {}
    for tensor, size in read:
        total[tensor] = total.get(tensor, 0) + size
    for tensor, size in total.items():
        # Of zero points whole words are read, 32 columns: of such small ones again for every part.
        words = tensor.endswith("qzeros")
        assert folder.tensors[tensor].nbytes <= size <= folder.tensors[tensor].nbytes * (4 if words else 1), tensor
    cut = [size < folder.tensors[tensor].nbytes for tensor, size in read if tensor.endswith("qweight")]
    assert cut
    assert all(cut), "no device's part is the whole of a tensor"


def test_generation_says_that_it_runs_on_one_device() -> None:
    model = shard(loaded("qwen2, tied"), make_mesh(1, 8, 1))
    with pytest.raises(ConfigError, match="lies on a mesh of 8 devices, and decoding runs on one"):
        generate(model, [[1, 2, 3]], [3], max_new_tokens=2)
