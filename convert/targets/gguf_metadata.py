"""What a GGUF file says of a model beside its tensors: its sizes, and its tokenizer.

llama.cpp has no tokenizer.json. It has a few kinds of tokenizer of its own, and the file names one of them and gives
it tokens, and merges or scores. Byte-level BPE is the kind ``gpt2``, with a regular expression by name for the cut into
words; BPE of SentencePiece is the kind ``llama``. Others are refused, since a model that is given other tokens than it
was trained on fails in silence.

Source: the GGUF specification of ggml; keys as llama.cpp's converter writes them for ``llama`` and ``qwen2``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.targets.gguf_sentencepiece import kind_of, misfits, scores, space_prefix
from convert.targets.target import Source
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import DecoderConfig
from lotaqaf_jax.quant.folder import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Tokenizer", "add_model", "add_tokenizer", "gguf_package", "read_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""A folder with none of these has no tokenizer."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
"""llama.cpp's name of a regular expression."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as the file has it.

    Attributes:
        pre: llama.cpp's name for how text is cut into words; ``default`` for SentencePiece, which does not cut.
        tokens: one for every row of the embedding; rows that the tokenizer does not use are ``[PAD<id>]``.
        types: ``TokenType`` of each, by name.
        scores: of each; None for byte-level BPE, which has merges.
        space_prefix: whether SentencePiece puts a space before a text.
    """

    pre: str
    tokens: Sequence[str]
    types: Sequence[str]
    scores: Sequence[float] | None = None
    space_prefix: bool = False


def gguf_package() -> Any:
    """The package ``gguf``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError as missing:
        raise ConfigError(
            f"--target gguf: package {missing.name} is not installed; pip install 'lotaqaf_jax[export]'."
        ) from None
    return gguf


def add_model(writer: GGUFWriter, config: DecoderConfig, source: Source, *, kinds: Sequence[str]) -> None:
    """Sizes and constants of a model.

    Args:
        writer: the file.
        config: the model.
        source: where the model's name is from.
        kinds: types of the file's tensors, by which its own is named.
    """
    gguf = gguf_package()
    named = {"Q4_1": "MOSTLY_Q4_1", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16", "F32": "ALL_F32"}
    file_type = next(file_type for kind, file_type in named.items() if kind in kinds)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(source.config.get("_name_or_path") or source.name)).name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def read_tokenizer(folder: Path | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a folder, or None, with a warning, where it has none.

    Args:
        folder: the model's, with tokenizer.json; None for a model that came without.
        vocab_size: rows of the model's embedding.

    Raises:
        ConfigError: a tokenizer that the file cannot hold, or one of another model.
        CheckpointError: tokenizer.json is damaged.
    """
    if folder is None or not any((folder / name).is_file() for name in _FILES):
        warnings.warn(
            "--target gguf: the model has no tokenizer beside it, so the file gets none: runtimes take token ids only.",
            stacklevel=2,
        )
        return None
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"--target gguf: {folder} has a tokenizer but no tokenizer.json. Make one: "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    said = read_json(folder / "tokenizer.json")
    wrong = next(_misfits(said), None)
    if wrong is not None:
        raise ConfigError(
            f"--target gguf: {folder / 'tokenizer.json'} {wrong}, expected byte-level BPE, as Llama 3 and Qwen2 have "
            "it, or SentencePiece's, as Llama 2 has it. Use another target, or export from a copy of the folder "
            "without tokenizer files: the file then has no tokenizer."
        )
    model, by_bytes = said["model"], _is_byte_level(said)
    tokens = {id_: (token, "NORMAL" if by_bytes else kind_of(token, model)) for token, id_ in model["vocab"].items()}
    for token in said.get("added_tokens") or ():
        if tokens.get(token["id"], ("", ""))[1] != "UNKNOWN":
            tokens[token["id"]] = (token["content"], "CONTROL" if token.get("special") else "USER_DEFINED")
    if max(tokens, default=0) >= vocab_size:
        raise ConfigError(
            f"--target gguf: {folder / 'tokenizer.json'} has a token with id {max(tokens)}, the model has "
            f"{vocab_size} tokens. Pass the model's own tokenizer."
        )
    rows = [tokens.get(i, (f"[PAD{i}]", "UNUSED")) for i in range(vocab_size)]
    names, kinds = [token for token, _ in rows], [kind for _, kind in rows]
    if by_bytes:
        return Tokenizer(_pre(said["pre_tokenizer"]), names, kinds)
    found = scores(model)
    return Tokenizer(
        "default",
        names,
        kinds,
        scores=[found[token] if kind == "NORMAL" else 0.0 for token, kind in rows],
        space_prefix=_space_prefix(said),
    )


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer | None, folder: Path | None) -> None:
    """A tokenizer, with merges, special tokens and chat template of ``folder``, which is where it was read."""
    gguf = gguf_package()
    if tokenizer is None or folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2" if tokenizer.scores is None else "llama")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in tokenizer.types])
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=tokenizer.scores is None, n_vocab=len(tokenizer.tokens))
    # llama.cpp puts BOS before every text of the kinds "llama-bpe" and "llama" unless the file says not to;
    # tokenizer.json says it.
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _misfits(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """What llama.cpp does not do."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        yield f"is of type {model.get('type')!r}"
        return
    for part in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            yield f"marks parts of words ({part})"
    changes = list(_steps(tokenizer.get("normalizer"), "normalizers"))
    cuts = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    if not _is_byte_level(tokenizer):
        yield from misfits(model, changes, cuts, {token["content"] for token in tokenizer.get("added_tokens") or ()})
        return
    if model.get("byte_fallback"):
        yield "is BPE of bytes and has tokens for bytes (byte_fallback) besides"
    if any(step.get("add_prefix_space") for step in cuts):
        yield "puts a space before the text (add_prefix_space)"
    for step in changes:
        # llama.cpp does not compose characters, and everyone's files of Qwen2 leave it at that.
        if step["type"] != "NFC":
            yield f"changes the text before it is cut (normalizer {step['type']})"


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether text becomes bytes first; BPE of characters is SentencePiece's otherwise."""
    return any(step["type"] == "ByteLevel" for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    changes = list(_steps(tokenizer.get("normalizer"), "normalizers"))
    cuts = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    prefix, same = space_prefix(changes, cuts) or (False, True)
    if not same:
        warnings.warn(
            "--target gguf: llama.cpp puts a space before a text that begins with one too, and before what follows a "
            "special token; this tokenizer (Metaspace) may not, and then the tokens are others.",
            stacklevel=3,
        )
    return prefix


def _pre(pre_tokenizer: Mapping[str, Any]) -> str:
    steps = list(_steps(pre_tokenizer, "pretokenizers"))
    if [step["type"] for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if [step["type"] for step in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        found = _SPLITS.get(steps[0]["pattern"].get("Regex"))
        if found is not None and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
            return found
    warnings.warn(
        "--target gguf: this tokenizer cuts text into words by a rule that llama.cpp's name is not known of here; the "
        "file says 'default', and may give other tokens. If you know it: gguf-new-metadata --pre-tokenizer NAME.",
        stacklevel=3,
    )
    return "default"


def _steps(step: Mapping[str, Any] | None, parts: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence of a tokenizer, which may hold sequences, or the one step that it is."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[parts]:
            yield from _steps(part, parts)
    else:
        yield step
