"""Tiny models that are built on the spot: what the hub has under ``local/`` when nobody has put anything there.

They are complete, in the files and formats of the real ones, and load with the real classes; only their weights are
random. Everything is a function of this source and the versions of the libraries, so a name has the same commit hash
in every process. To add one, write a function that fills a directory and put it into ``BUILDERS``.
"""

import json
import tempfile
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

# Tiny {name} for chats

A {name} with two layers and random weights, and a byte-level BPE tokenizer with a ChatML template. It was built on the
spot so that examples and tests run without a download. It has learnt nothing.
"""

_PIPELINE_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: {kind}
tags:
- tiny
---

# {title}

Every part of the real pipeline with a few small layers and random weights. It was built on the spot so that examples
and tests run without a download. It has learnt nothing: what it makes is noise.
"""


def llama_chat(directory: Path) -> None:
    """A Llama of about 40,000 weights with tokenizer and chat template, as ``save_pretrained`` writes them."""
    _chat_model(directory, "Llama")


def qwen_chat(directory: Path) -> None:
    """A Qwen 2 like :func:`llama_chat`'s Llama."""
    _chat_model(directory, "Qwen2")


def _chat_model(directory: Path, name: str) -> None:
    transformers: Any = import_module("transformers")
    torch: Any = import_module("torch")

    tokenizer = _chat_tokenizer()
    tokenizer.save_pretrained(directory)
    config = getattr(transformers, f"{name}Config")(
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
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    fill_weights(model, scale=2.0)  # small enough to train, large enough that adapters of a frozen model learn
    model.save_pretrained(directory)
    (directory / "README.md").write_text(_CARD.format(name=name))


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


def sdxl(directory: Path) -> None:
    """A Stable Diffusion XL of 1.4 million weights, as ``save_pretrained`` writes it: noise, but all of its parts."""
    diffusers: Any = import_module("diffusers")
    transformers: Any = import_module("transformers")

    tokenizer = _clip_tokenizer(directory)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _nobody_notices():
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,  # pooled text, and six numbers about sizes
            cross_attention_dim=64,  # both text encoders, side by side
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),  # an eighth of the image's size, as in the real one
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=16,
            sample_size=128,
            scaling_factor=0.13025,
        )
        encoders = transformers.CLIPTextModel(text), transformers.CLIPTextModelWithProjection(text)
    for seed, part in enumerate((unet, vae, *encoders)):
        _fill_pipeline(part, seed)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(directory)
    (directory / "README.md").write_text(_PIPELINE_CARD.format(kind="text-to-image", title="Tiny Stable Diffusion XL"))


def svd(directory: Path) -> None:
    """A Stable Video Diffusion of 2 million weights, as ``save_pretrained`` writes it: noise, in motion."""
    diffusers: Any = import_module("diffusers")
    transformers: Any = import_module("transformers")

    with _nobody_notices():
        unet = diffusers.UNetSpatioTemporalConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            cross_attention_dim=32,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=3 * 32,  # fps, motion bucket, noise
            num_frames=8,
        )
        vae = diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 32),  # an eighth of the image's size, as in the real one
            down_block_types=("DownEncoderBlock2D",) * 4,
            sample_size=128,
            force_upcast=True,
        )
        encoder = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=32,
                image_size=224,  # what the pipeline gives it, whatever the size of the image
                patch_size=56,
            )
        )
    for seed, part in enumerate((unet, vae, encoder)):
        _fill_pipeline(part, seed)
    pipeline = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        unet=unet,
        image_encoder=encoder,
        feature_extractor=transformers.CLIPImageProcessor(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="v_prediction",
            timestep_spacing="leading",
            steps_offset=1,
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        ),
    )
    pipeline.save_pretrained(directory)
    (directory / "README.md").write_text(
        _PIPELINE_CARD.format(kind="image-to-video", title="Tiny Stable Video Diffusion")
    )


def _nobody_notices() -> Any:
    """While models are made: the caller's random numbers go on as if nothing had been built."""
    return import_module("torch").random.fork_rng(devices=[])


def _fill_pipeline(part: Any, seed: int) -> None:
    torch: Any = import_module("torch")
    fill_weights(part, seed=seed)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if parameter.dim() <= 1:  # biases are drawn when the model is made
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    part.eval()


def _clip_tokenizer(directory: Path) -> Any:
    """A CLIP tokenizer that knows single characters only."""
    transformers: Any = import_module("transformers")
    tokenizers: Any = import_module("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary, merges = Path(scratch, "vocab.json"), Path(scratch, "merges.txt")
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


# repository on the local hub -> what fills its directory
BUILDERS: dict[str, Callable[[Path], None]] = {
    "local/tiny-llama-chat": llama_chat,
    "local/tiny-qwen-chat": qwen_chat,
    "local/tiny-sdxl": sdxl,
    "local/tiny-svd": svd,
}
