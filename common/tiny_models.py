"""Tiny models that are built on the spot: what the hub has under ``local/`` when nobody has put anything there.

They are complete, in the files and formats of the real ones, and load with the real classes; only their weights are
random. Everything is a function of this source and the versions of the libraries, so a name has the same commit hash
in every process. To add one, write a function that fills a directory and put it into ``BUILDERS``.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

# Special tokens come first in the vocabulary, in this order
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]

# {% generation %} marks what the assistant says, for a loss on answers only
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = """
A checkpoint is a copy of everything that a training needs to go on: the weights, the state of the optimizer, the
place in the data and the random numbers. When the machine stops, the next one reads the copy and goes on from there.
What is the capital of France? The capital of France is Paris. How many days are there in a week? There are seven days
in a week. Write a short sentence about the sea. The sea is wide and blue, and the wind moves the waves. Name three
colours. Red, green and blue are three colours. What comes after nine? Ten comes after nine. Please explain why the
sky is blue. The air scatters blue light more than red light. Translate good morning. Give the opposite of hot. Cold.
"""

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- tiny
---

# Tiny Llama for chats

A Llama with two layers and random weights, and a byte-level BPE tokenizer with a ChatML template. It was built on the
spot so that examples and tests run without a download. It has learnt nothing.
"""


def llama_chat(directory: Path) -> None:
    """A Llama of about 40,000 weights with tokenizer and chat template, as ``save_pretrained`` writes them."""
    transformers: Any = import_module("transformers")
    torch: Any = import_module("torch")

    tokenizer = _chat_tokenizer()
    tokenizer.save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had been built
        model = transformers.LlamaForCausalLM(config)
    fill_weights(model, scale=2.0)  # small enough to train, large enough that adapters of a frozen model learn
    model.save_pretrained(directory)
    (directory / "README.md").write_text(_CARD)


def fill_weights(model: Any, scale: float = 1.0, seed: int = 0) -> None:
    """Give every matrix of a PyTorch module uniform random weights, scaled to its inputs; vectors stay as they are.

    They come from NumPy's integers, because ``torch.randn`` may differ in the last bit from processor to processor.
    """
    torch: Any = import_module("torch")
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                integers = random.integers(-(2**15), 2**15, size=tuple(parameter.shape))
                inputs = parameter.shape[1:].numel()
                weights = integers * (scale * (3 / inputs) ** 0.5 / 2**15)
                parameter.copy_(torch.from_numpy(weights.astype(np.float32)))


def _chat_tokenizer() -> Any:
    transformers: Any = import_module("transformers")
    tokenizers: Any = import_module("tokenizers")

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([_TEXT], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


# repository on the local hub -> what fills its directory
BUILDERS: dict[str, Callable[[Path], None]] = {"local/tiny-llama-chat": llama_chat}
