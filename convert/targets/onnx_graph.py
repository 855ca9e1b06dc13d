"""The graph of a decoder in ONNX, by the model builder of onnxruntime-genai, with the weights that it is given.

The builder reads GPTQ folders too, but in asymmetric ones gets some zero points wrong, has no place for mu, and takes
neither 3 bit, a partial last group nor dense projections among quantised ones. So a subclass hands it its modules
ready-made, in place of what its loaders make of a folder (``load_weights``), and adds what is put around MatMulNBits
(``make_matmul``). These are not its documented interface, hence the check of its version.

Source: onnxruntime-genai 0.18, ``onnxruntime_genai.models.builders``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.targets.onnx_matrix import Matrix
from lotaqaf_jax.errors import ConfigError

__all__ = ["FILES", "Dense", "Packed", "build_graph", "onnx_packages", "read_matrices"]

FILES = ("model.onnx", "model.onnx.data", "genai_config.json")

_VERSION = "0.18"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(eq=False)
class Dense:
    """A matrix (out, in) or a vector, as the builder takes one that is not quantised."""

    weight: Any
    bias: Any = None


class Packed:
    """A quantised matrix under the names of the builder, and the :class:`Matrix` that it is."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.bias = matrix, None
        self.qweight, self.scales, self.qzeros = matrix.words, matrix.scales, matrix.zeros
        self.bits, self.group_size = matrix.bits, matrix.block
        self.in_features, self.out_features = matrix.n_in, len(matrix.words)


@dataclasses.dataclass(eq=False)
class _DecoderLayer:
    """A layer; the builder knows it by the end of the name of its class."""

    input_layernorm: Dense
    self_attn: SimpleNamespace
    post_attention_layernorm: Dense
    mlp: SimpleNamespace


@dataclasses.dataclass(eq=False)
class _Weights:
    """A whole model."""

    embedding: Dense
    layers: list[_DecoderLayer]
    final_norm: Dense
    lm_head: Dense | Packed

    def modules(self) -> list[Any]:
        """In the order of the model."""
        return [self.embedding, *self.layers, self.final_norm, self.lm_head]


def onnx_packages() -> Any:
    """The module ``onnxruntime_genai.models.builders``.

    Raises:
        ConfigError: a package that it needs is not installed, or it is of another version.
    """
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime_genai
        import torch  # noqa: F401

        found = onnxruntime_genai.__version__
        if not found.startswith(f"{_VERSION}."):
            raise ConfigError(
                f"--target onnx: found onnxruntime-genai {found}, expected {_VERSION}, whose model builder is used; "
                "pip install 'lotaqaf_jax[onnx]'."
            )
        from onnxruntime_genai.models import builders
    except ImportError as missing:
        raise ConfigError(
            f"--target onnx: package {missing.name} is not installed; pip install 'lotaqaf_jax[onnx]'."
        ) from None
    return builders


def build_graph(folder: Path, model_type: str, tied: bool, modules: Mapping[str, Dense | Packed]) -> None:
    """Write the model's graph, its weights and genai_config.json.

    Args:
        folder: has config.json, and tokenizer and generation_config.json where there are any.
        model_type: "llama" or "qwen2".
        tied: the output head is the embedding.
        modules: every matrix and norm by its Hugging Face name, without ``lm_head`` where that is tied.

    Raises:
        ConfigError: the builder does not take the model.
    """
    builders = onnx_packages()
    from transformers import AutoConfig

    base = {"llama": builders.LlamaModel, "qwen2": builders.QwenModel}[model_type]
    config = AutoConfig.from_pretrained(folder)
    # accuracy_level 1 computes in float32; 4, the builder's own for a CPU, rounds the inputs of every layer to 8 bit.
    options = {"fuse_qkv": False, "shared_embeddings": tied, "accuracy_level": 1, "hf_token": False}
    with _quiet():
        try:
            # Of the cache only the name is asked for: nothing is downloaded.
            writer = _builder(base)(config, _float32(), _float32(), "cpu", str(folder / "cache"), options)
            writer.given = _weights(modules, config.num_hidden_layers)
            writer.make_model("")
            writer.save_model(str(folder))
            writer.make_genai_config(config, {}, str(folder))
        except (NotImplementedError, ValueError) as problem:
            raise ConfigError(
                f"--target onnx: onnxruntime-genai does not take this model: {str(problem).rstrip('.')}. Put what it "
                "misses into config.json, or use another target; gptq holds every model that loads."
            ) from problem


def _builder(base: Any) -> Any:
    class Builder(base):
        """The builder, with the weights that it is given."""

        given: _Weights

        def load_weights(self, input_path: str) -> _Weights:
            return self.given

        def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
            if not isinstance(matmul, Packed):
                return super().make_matmul(matmul, basename, root_input, **kwargs)
            found, place = matmul.matrix, basename.rpartition("/")[0]
            if found.order is not None:
                ordered = f"{place}/order/Gather"
                self.make_initializer(found.order, _initializer(ordered))
                shape = self.make_hidden_state_shape(last_dim=found.n_in)
                self.make_gather(ordered, [root_input, _initializer(ordered)], self.io_dtype, shape, axis=-1)
                root_input = f"{ordered}/output_0"
            product = self.make_matmul_nbits(matmul, basename, root_input, **kwargs)
            if found.sums is None or found.offsets is None:
                return product
            # The sums are over the groups of ordered rows, and so the same matrix wherever groups are alike.
            sums, offsets = "sums.{}.{}".format(*found.sums.shape), _initializer(f"{place}/offsets/MatMul")
            branch = self._product(f"{place}/sums/MatMul", root_input, sums, found.sums)
            branch = self._product(f"{place}/offsets/MatMul", branch, offsets, found.offsets)
            shape = self.make_hidden_state_shape(last_dim=matmul.out_features)
            self.make_add(f"{place}/offsets/Add", [f"{product}/output_0", branch], self.io_dtype, shape)
            return f"{place}/offsets/Add"

        def resolve_special_token_ids(self, config: Any, extra_kwargs: Any) -> tuple[int, Any, int]:
            if any((Path(self.model_name_or_path) / name).is_file() for name in _TOKENIZERS):
                return super().resolve_special_token_ids(config, extra_kwargs)
            # Where there is no tokenizer transformers makes an empty one up, with an end of text of its own.
            ends = config.eos_token_id
            if ends is None:
                raise ValueError("Its config.json has no eos_token_id, and there is no tokenizer to ask.")
            first = ends[0] if isinstance(ends, list) else ends
            begin, pad = (first if one is None else one for one in (config.bos_token_id, config.pad_token_id))
            return begin, ends, pad

        def _product(self, name: str, root_input: str, initializer: str, factor: np.ndarray) -> str:
            if initializer not in self.graph.initializers:
                self.make_initializer(factor, initializer)
            self.make_node("MatMul", [root_input, initializer], [f"{name}/output_0"], name=name)
            shape = self.make_hidden_state_shape(last_dim=factor.shape[1])
            self.make_value(f"{name}/output_0", self.io_dtype, shape)
            return f"{name}/output_0"

    return Builder


def _float32() -> Any:
    import onnx_ir

    return onnx_ir.DataType.FLOAT


def _initializer(node: str) -> str:
    """Its name, as the builder derives one from that of the node."""
    return node[1:].replace("/", ".") + ".weight"


def _weights(modules: Mapping[str, Dense | Packed], layers: int) -> _Weights:
    def part(prefix: str, *names: str) -> SimpleNamespace:
        return SimpleNamespace(**{name: modules[f"{prefix}.{name}"] for name in names})

    def dense(name: str) -> Dense:
        found = modules[name]
        assert isinstance(found, Dense)
        return found

    embedding = dense("model.embed_tokens")
    blocks = []
    for i in range(layers):
        layer = f"model.layers.{i}"
        blocks.append(
            _DecoderLayer(
                dense(f"{layer}.input_layernorm"),
                part(f"{layer}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
                dense(f"{layer}.post_attention_layernorm"),
                part(f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"),
            )
        )
    head = modules.get("lm_head", Dense(embedding.weight))
    return _Weights(embedding, blocks, dense("model.norm"), head)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The builder tells of every layer."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def read_matrices(folder: Path) -> Callable[[str], Matrix]:
    """Gives the quantised weight of a module, by its Hugging Face name, as the written file has it.

    Args:
        folder: the written folder. The file is mapped, not read whole.
    """
    import onnx_ir

    graph = onnx_ir.load(folder / FILES[0]).graph
    nodes: dict[str | None, Any] = {node.name: node for node in graph}

    def constant(node: Any, i: int) -> Any:
        return None if node is None else node.inputs[i].const_value.numpy()

    def read(name: str) -> Matrix:
        place = _place(name)
        product = nodes[f"{place}/MatMulNBits"]
        return Matrix(
            bits=product.attributes["bits"].as_int(),
            block=product.attributes["block_size"].as_int(),
            n_in=product.attributes["K"].as_int(),
            words=constant(product, 1),
            scales=constant(product, 2),
            zeros=constant(product, 3),
            order=constant(nodes.get(f"{place}/order/Gather"), 1),
            sums=constant(nodes.get(f"{place}/sums/MatMul"), 1),
            offsets=constant(nodes.get(f"{place}/offsets/MatMul"), 1),
        )

    return read


def _place(name: str) -> str:
    """Where the builder puts a module: ``model.layers.0.self_attn.q_proj`` at ``/model/layers.0/attn/q_proj``."""
    if name == "lm_head":
        return "/lm_head"
    _, _, layer, part, projection = name.split(".")
    return f"/model/layers.{layer}/{part.removeprefix('self_')}/{projection}"
