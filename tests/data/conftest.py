"""Small tokenizers: a token per byte, with the special tokens and the chat templates of several families."""

from __future__ import annotations

import os

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Bars of several threads disturb the captured output.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Like Qwen2's: a default system prompt, a newline after the token that closes a turn.
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 3's: BOS, today's date in a system prompt, trimmed contents.
LLAMA3 = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Today: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Like Llama 2's: no generation prompt of its own, and it refuses turns out of order.
LLAMA2 = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Like Phi 3's: EOS at the very end only, when no answer is asked for.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No token that closes a turn.
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Like the reasoning models': earlier answers lose a part once more turns follow.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if loop.last else m.content.split('!')[-1] }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    template: str | None = None,
    *,
    eos: str | None = "</s>",
    bos: str | None = None,
    special: tuple[str, ...] = (),
    merges: tuple[tuple[str, str], ...] = (),
    pad: str | None = None,
    add_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 256 bytes, the merges asked for and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokens = [token for token in (bos, eos, pad, *special) if token]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(tokens)])
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CHATML, eos="<|im_end|>", pad="<|endoftext|>", special=("<|im_start|>",))


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    """EOS is not the token that closes a turn, as in Llama 3's base tokenizer."""
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_tokenizer(LLAMA3, eos="<|end_of_text|>", bos="<|begin_of_text|>", special=special, add_bos=True)


@pytest.fixture(scope="session")
def llama2() -> PreTrainedTokenizerFast:
    return byte_tokenizer(LLAMA2, bos="<s>", add_bos=True)


@pytest.fixture(scope="session")
def phi3() -> PreTrainedTokenizerFast:
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    return byte_tokenizer(PHI3, eos="<|endoftext|>", pad="<|endoftext|>", special=special)


@pytest.fixture(scope="session")
def bare() -> PreTrainedTokenizerFast:
    return byte_tokenizer(BARE)


@pytest.fixture(scope="session")
def forgetful() -> PreTrainedTokenizerFast:
    return byte_tokenizer(FORGETFUL, eos="<|im_end|>", special=("<|im_start|>",))


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """No chat template; BOS is the tokenizer's own habit, and padding is EOS."""
    return byte_tokenizer(None, bos="<s>", pad="</s>", add_bos=True)
