"""What keeps a model folder from loading, or from being computed right: one rule a function.

A rule takes a folder and yields sentences: none where it is kept. Which runtime has which rules is in
:mod:`convert.runtimes.table`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from convert.runtimes.folder import ModelFolder, Module

__all__ = [
    "FUSED",
    "LORA_STEPS",
    "Rule",
    "awq_keys",
    "awq_version",
    "awq_width",
    "compressed_order",
    "dynamic_names_parts",
    "gguf_magic",
    "gptq_keys",
    "gptqmodel_meta",
    "groups_of_marlin",
    "head_not_declared",
    "head_quantized",
    "ignores_g_idx",
    "ignores_qzeros",
    "lora_alone",
    "lora_of_one_rank",
    "lora_too_wide",
    "lora_width",
    "marlin_path",
    "mlx_grid",
    "no_act_order",
    "no_config",
    "no_dynamic",
    "not_planar",
    "on_marlin",
    "parts_alike",
    "strict_names",
    "symmetric_widths",
    "whole_groups",
    "whole_words",
    "zeros_plus_one",
]

Rule = Callable[[ModelFolder], Iterator[str]]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LORA_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MARLIN_WIDTHS = (4, 8)
_MARLIN_GROUPS = (-1, 32, 64, 128)
_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_PARTS = {
    "gptq": "weight|qweight|qzeros|scales|g_idx",
    "awq": "weight|qweight|qzeros|scales",
    "compressed-tensors": "weight|weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx|input_scale",
    "mlx": "weight|scales|biases",
    "16-bit": "weight",
}


def _names(found: Sequence[Module | str]) -> str:
    """The first of several, and how many more there are."""
    first = found[0] if isinstance(found[0], str) else found[0].name
    return first if len(found) == 1 else f"{first} and {len(found) - 1} more"


def _those(folder: ModelFolder, wrong: Callable[[Module], bool]) -> list[Module]:
    return [module for module in folder.modules if wrong(module)]


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


# GPTQ: the config


def no_config(folder: ModelFolder) -> Iterator[str]:
    """transformers looks into config.json alone."""
    if not folder.embedded:
        yield "config.json has no quantization_config, and quantize_config.json is not read: copy it there."


def gptq_keys(*keys: str) -> Rule:
    """Keys of the quantisation config without which the loader stops."""

    def rule(folder: ModelFolder) -> Iterator[str]:
        missing = [key for key in keys if key not in folder.quantization]
        if missing:
            yield f"the quantisation config has no {_listed(missing)}, which the loader asks for."

    return rule


def not_planar(folder: ModelFolder) -> Iterator[str]:
    """Loaders that look at neither checkpoint_format nor the words read bit planes as a stream."""
    if folder.checkpoint_format == "gptq_p":
        yield "checkpoint_format is gptq_p (bit planes), which is read as if it were gptq: wrong weights, in silence."


def no_dynamic(folder: ModelFolder) -> Iterator[str]:
    """Per-module overrides that the loader does not know."""
    if folder.quantization.get("dynamic"):
        yield "the quantisation config has `dynamic`, which the loader does not know: it builds the wrong layers."


def gptqmodel_meta(folder: ModelFolder) -> Iterator[str]:
    """Asymmetric v1 is read from writers of GPTQModel 0.9 or later alone."""
    if folder.checkpoint_format != "gptq" or folder.quantization.get("sym") in (True, None):
        return
    writers = (folder.quantization.get("meta") or {}).get("quantizer") or []
    for writer in [writers] if isinstance(writers, str) else writers:
        name, _, version = str(writer).lower().partition(":")
        if name == "gptqmodel" and version:  # the first one decides
            if _version(version) >= (0, 9):
                return
            break
    yield (
        f"asymmetric zero points in checkpoint_format gptq, and meta.quantizer is {writers or 'missing'}: expected "
        "gptqmodel:0.9.0 or later in it."
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def symmetric_widths(folder: ModelFolder) -> Iterator[str]:
    """Marlin: 4 or 8 bit, and ``sym: true``."""
    if wrong := _those(folder, lambda module: module.bits not in _MARLIN_WIDTHS):
        yield f"{_names(wrong)}: {_listed(sorted({m.bits for m in wrong}))} bit; GPTQ is taken with 4 or 8 bit."
    if wrong := _those(folder, lambda module: not module.sym):
        hint = " All zero points are in the middle: set sym to true." if all(m.centred for m in wrong) else ""
        yield f"{_names(wrong)}: sym is false; GPTQ is taken symmetric only.{hint}"


def no_act_order(folder: ModelFolder) -> Iterator[str]:
    """``desc_act`` is refused, but for one group over all rows, where it means nothing."""
    if wrong := _those(folder, lambda module: module.desc_act and module.group_size != -1):
        hint = " Every g_idx is i // group_size: set desc_act to false." if all(m.in_order for m in wrong) else ""
        yield f"{_names(wrong)}: desc_act is true, and act-order is not loaded.{hint}"


def groups_of_marlin(folder: ModelFolder) -> Iterator[str]:
    """Sizes of groups that there is a kernel for."""
    if wrong := _those(folder, lambda module: module.group_size not in _MARLIN_GROUPS):
        sizes = sorted({module.group_size for module in wrong})
        yield f"{_names(wrong)}: group_size {_listed(sizes)}; expected one of {_listed(_MARLIN_GROUPS)}."


def head_not_declared(folder: ModelFolder) -> Iterator[str]:
    """A quantised head is built where ``lm_head: true`` says so."""
    if folder.quantizes_head and not folder.quantization.get("lm_head"):
        yield "lm_head is quantised, but the quantisation config lacks lm_head: true, so a 16-bit head is built."


def head_quantized(folder: ModelFolder) -> Iterator[str]:
    """A quantised head that the loader leaves at random."""
    if folder.quantizes_head:
        yield "lm_head is quantised, and is read as if it were not: wrong logits, in silence."


# GPTQ: the tensors


def ignores_qzeros(folder: ModelFolder) -> Iterator[str]:
    """Where the config says symmetric, zero points are not read."""
    if wrong := _those(folder, lambda module: module.sym and not module.centred):
        yield (
            f"{_names(wrong)}: sym is true, but qzeros holds zero points other than {2 ** (wrong[0].bits - 1)}, and "
            "they are not read: wrong weights, in silence."
        )


def ignores_g_idx(folder: ModelFolder) -> Iterator[str]:
    """Where the config says no act-order, g_idx is not read."""
    if wrong := _those(folder, lambda module: not module.desc_act and not module.in_order):
        yield (
            f"{_names(wrong)}: desc_act is false, but g_idx is not i // group_size, and it is not read: wrong weights, "
            "in silence."
        )


def whole_groups(folder: ModelFolder) -> Iterator[str]:
    """A partial last group has no row of scales in a loader that divides."""
    if wrong := _those(folder, lambda module: not module.whole_groups):
        yield (
            f"{_names(wrong)}: {wrong[0].shape[0]} inputs in groups of {wrong[0].group_size} leave a partial last "
            "group, which has no place."
        )


def whole_words(folder: ModelFolder) -> Iterator[str]:
    """A last word that is not full has no place in a loader that divides."""
    if wrong := _those(folder, lambda module: any(size * module.bits % 32 for size in module.shape)):
        yield f"{_names(wrong)}: {wrong[0].shape} values of {wrong[0].bits} bit do not fill whole 32-bit words."


def zeros_plus_one(folder: ModelFolder) -> Iterator[str]:
    """A kernel that adds one to each stored zero point by itself: v1, and no true zero point of 0 (see quant.zeros)."""
    if marlin_path(folder):
        return
    if folder.checkpoint_format == "gptq_v2":
        yield (
            "checkpoint_format is gptq_v2: the kernel adds one to every stored zero point, as v1 needs: weights off by "
            "one step, in silence. Write v1 (checkpoint_format gptq)."
        )
    elif wrong := _those(folder, lambda module: module.lowest_zero == 0):
        yield (
            f"{_names(wrong)}: zero points of 0, which v1 stores as a borrow from the next field; the kernel adds one "
            "field by field: wrong weights there, in silence."
        )


def marlin_path(folder: ModelFolder) -> bool:
    """Whether SGLang takes its Marlin kernels, which read no zero points, by the config as it stands."""
    config = folder.quantization
    return (
        folder.checkpoint_format != "gptq_p"
        and config.get("sym") is True
        and config.get("desc_act") is not None
        and config.get("bits") in _MARLIN_WIDTHS
        and config.get("group_size") in _MARLIN_GROUPS
    )


def on_marlin(rule: Rule) -> Rule:
    """A rule of SGLang's Marlin path alone; its general kernel takes 2, 3, 4 and 8 bit, all that a config may say."""

    def chosen(folder: ModelFolder) -> Iterator[str]:
        if marlin_path(folder):
            yield from rule(folder)

    return chosen


def parts_alike(folder: ModelFolder) -> Iterator[str]:
    """q, k and v are computed as one layer, and so are gate and up."""
    of = {module.name: module for module in folder.modules}
    for prefix, parts in _fused(folder):
        found = {
            (m.bits, m.group_size, m.sym, m.desc_act) if (m := of.get(f"{prefix}.{part}")) else None for part in parts
        }
        if len(found) > 1:
            yield f"{prefix}: {_listed(parts)} are computed as one layer, but are not quantised alike."
            return


def dynamic_names_parts(folder: ModelFolder) -> Iterator[str]:
    """`dynamic` is asked for the name of the fused layer, which a pattern for its parts need not match; and `dynamic`
    alone leaves a module in 16 bit."""
    if folder.rules is None:
        return
    packed = {module.name for module in folder.modules}
    for name in _linears(folder):
        prefix, _, part = name.rpartition(".")
        asked = next((f"{prefix}.{fused}" for fused, parts in FUSED.items() if part in parts), name)
        expected, found = folder.rules.for_module(asked), folder.rules.for_module(name) if name in packed else None
        if expected != found:
            loaded = "in 16 bit" if expected is None else f"as {expected.bits} bit in groups of {expected.group_size}"
            held = "is in 16 bit" if found is None else f"has {found.bits} bit in groups of {found.group_size}"
            yield (
                f"{name}: {held}, but is loaded {loaded}, as the quantisation config says of {asked}; name that in "
                "`dynamic`."
            )
            return


def _linears(folder: ModelFolder) -> dict[str, None]:
    """The linear layers of the decoder's blocks, in the order of the file."""
    modules = (tensor.rpartition(".")[0] for tensor in folder.tensors)
    return {name: None for name in modules if name.endswith("_proj")}


def _fused(folder: ModelFolder) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prefix and parts of every layer that a server fuses."""
    prefixes: dict[tuple[str, tuple[str, ...]], None] = {}
    for name in _linears(folder):
        prefix, _, last = name.rpartition(".")
        for parts in FUSED.values():
            if last in parts:
                prefixes[prefix, parts] = None
    yield from prefixes


# The LoRA that holds mu


def lora_width(folder: ModelFolder) -> int | None:
    """Smallest ``--max-lora-rank`` of vLLM's that holds the LoRA in offset_adapter/; None where none does."""
    widest = max([folder.lora_rank, *folder.lora_ranks.values()])
    return next((step for step in LORA_STEPS if step >= widest), None)


def lora_too_wide(folder: ModelFolder) -> Iterator[str]:
    """vLLM's --max-lora-rank ends at 512; the rank is the number of groups."""
    if folder.lora_ranks and lora_width(folder) is None:
        yield (
            f"offset_adapter/ is a LoRA of rank {max(folder.lora_ranks.values())}, above {LORA_STEPS[-1]}, the largest "
            "--max-lora-rank: mu would be left out."
        )


def lora_of_one_rank(folder: ModelFolder) -> Iterator[str]:
    """SGLang gives all modules of a LoRA the rank ``r``."""
    if others := [name for name, rank in folder.lora_ranks.items() if rank != folder.lora_rank]:
        yield (
            f"offset_adapter/: {_names(others)} is of rank {folder.lora_ranks[others[0]]}, not of r = "
            f"{folder.lora_rank}: one rank for all modules is loaded, rank_pattern is not. Target peft writes one."
        )


def lora_alone(folder: ModelFolder) -> Iterator[str]:
    """SGLang reads every .safetensors file in a LoRA's folder as part of the LoRA."""
    if folder.lora_beside:
        yield (
            f"offset_adapter/: {_listed(folder.lora_beside)} is read as part of the LoRA, which stops the loader. "
            "Target peft writes the LoRA alone."
        )


# Other formats


def awq_keys(folder: ModelFolder) -> Iterator[str]:
    """Both spellings of AWQ's keys are read; zero_point has one."""
    pairs = (("bits", "w_bit"), ("group_size", "q_group_size"), ("zero_point",))
    if missing := [names[0] for names in pairs if not any(name in folder.quantization for name in names)]:
        yield f"the quantisation config has no {_listed(missing)}, which the loader asks for."


def awq_width(folder: ModelFolder) -> Iterator[str]:
    """AWQ of 4 bit."""
    bits = folder.quantization.get("bits", folder.quantization.get("w_bit", 4))
    if bits != 4:
        yield f"AWQ of {bits} bit; only 4 bit is loaded."


def awq_version(folder: ModelFolder) -> Iterator[str]:
    """Of AWQ's layouts the one called GEMM is read, whatever the config says."""
    version = str(folder.quantization.get("version") or folder.quantization.get("format") or "gemm").lower()
    if version != "gemm":
        yield f"AWQ of version {version}; its words are read as gemm's: wrong weights, in silence."


def compressed_order(folder: ModelFolder) -> Iterator[str]:
    """compressed-tensors with groups in act-order."""
    for name, group in (folder.quantization.get("config_groups") or {}).items():
        order = ((group or {}).get("weights") or {}).get("actorder")
        if order in (True, "group", "dynamic"):
            yield f"{name}: actorder is {order!r}, and groups in act-order are not loaded."


def mlx_grid(folder: ModelFolder) -> Iterator[str]:
    """Widths and groups of MLX's affine quantisation."""
    config = folder.config.get("quantization") or folder.quantization
    if folder.kind == "mlx" and config.get("bits") not in (2, 3, 4, 5, 6, 8):
        yield f"quantization.bits is {config.get('bits')}; expected 2, 3, 4, 5, 6 or 8."
    group_size = config.get("group_size", config.get("q_group_size"))
    if group_size not in (32, 64, 128):
        yield f"group_size is {group_size}; expected 32, 64 or 128."


def gguf_magic(folder: ModelFolder) -> Iterator[str]:
    """A GGUF file begins with its name and version 2 or 3."""
    for path in folder.gguf:
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(8)
            if start[:4] != b"GGUF" or int.from_bytes(start[4:], "little") not in (2, 3):
                yield f"{path.name}: does not begin as a GGUF file of version 2 or 3 does."


def strict_names(folder: ModelFolder) -> Iterator[str]:
    """Tensors that are no parameter of the model stop the loader. Known for Llama and Qwen2."""
    if (folder.config.get("architectures") or [None])[0] not in _ARCHITECTURES or folder.kind not in _PARTS:
        return
    part = _PARTS[folder.kind]
    # The head may be quantised, and in MLX the embedding; norms never are.
    known = re.compile(
        rf"(model\.embed_tokens|lm_head)\.({part})|model\.norm\.weight|.*rotary_emb\.(inv_freq|cos_cached|sin_cached)"
        rf"|model\.layers\.(?P<layer>\d+)\.(self_attn\.[qkvo]_proj\.({part}|bias)"
        rf"|mlp\.(gate|up|down)_proj\.({part}|bias)|(input|post_attention)_layernorm\.weight)"
    )
    layers = folder.config.get("num_hidden_layers", 0)

    def unknown(name: str) -> bool:
        match = known.fullmatch(name)
        return match is None or (match["layer"] is not None and int(match["layer"]) >= layers)

    if found := [name for name in folder.tensors if unknown(name)]:
        yield f"{_names(found)}: no parameter of the model, and tensors that are not known stop the loader."
