"""Text to images with Stable Diffusion XL, images to clips with Stable Video Diffusion. Kill it whenever you like.

python generate.py                   # checkpoints go to checkpoints/, images and clips to outputs/; run it again
python generate.py settings.yaml     # after a kill
python generate.py --fresh           # forget them and start anew
"""

import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
)
from diffusers.utils import export_to_video, logging
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
from painting import check_video, file_name, outputs_digest, pixels_digest, write_images
from PIL import Image
from settings import GenerateConfig, item_seed, load, patterns
from transformers.utils import logging as transformers_logging

from common import CheckpointManager, hub
from common.diffusers import CheckpointCallback, Item

for silence in (logging.disable_progress_bar, transformers_logging.disable_progress_bar, disable_progress_bars):
    silence()
SCHEDULERS = {"euler": EulerDiscreteScheduler, "euler_ancestral": EulerAncestralDiscreteScheduler}


@dataclass(frozen=True)
class Model:
    """A downloaded pipeline and the commit that it is of."""

    path: Path
    commit: str


@dataclass(frozen=True)
class Output:
    """A finished image (height, width, 3) or clip (frames, height, width, 3), as uint8."""

    record: dict  # what the history says about it
    pixels: np.ndarray
    reference: Any  # of its checkpoint

    @classmethod
    def of(cls, item: Item, pixels: np.ndarray, checkpoint: CheckpointCallback) -> "Output":
        about = {key: item.request[key] for key in ("index", "prompt", "seed")}
        record = {"step": item.step, "kind": item.kind, **about, "digest": pixels_digest(pixels)}
        return cls(record, pixels, checkpoint.references[item.name])


@dataclass(frozen=True)
class GenerateResult:
    path: Path  # a directory with the images as PNG and the clips as MP4
    history: list
    outputs_digest: str


def load_pipeline(kind: str, model: Model, config: GenerateConfig):
    """From verified files, in half precision on a GPU and in single precision on a CPU."""
    hub.verify(model.path, model.commit)
    gpu = torch.cuda.is_available()
    options: dict = {"dtype": torch.float16 if gpu else torch.float32, "use_safetensors": True}
    if kind == "image":
        # a watermark would depend on whether a package for it is installed
        options |= {"variant": config.image_variant or None, "add_watermarker": False}
        pipe = StableDiffusionXLPipeline.from_pretrained(model.path, **options)
        pipe.scheduler = SCHEDULERS[config.image_scheduler].from_config(pipe.scheduler.config)
        if config.vae_slicing:
            pipe.vae.enable_slicing()
    else:
        pipe = StableVideoDiffusionPipeline.from_pretrained(model.path, variant=config.video_variant or None, **options)
        if config.video_forward_chunking:
            pipe.unet.enable_forward_chunking()
    pipe.set_progress_bar_config(disable=True)
    if gpu and config.cpu_offload:
        pipe.enable_model_cpu_offload()
    elif gpu:
        pipe.to("cuda")
    return pipe


def request(kind: str, config: GenerateConfig, model: Model, index: int, **more) -> dict:
    """Everything that the pixels of an item depend on: equal requests give equal pixels."""
    options = {key: value for key, value in config.what.items() if key.startswith(f"{kind}_")}
    del options[f"{kind}_revision"]  # two names of one commit give the same pixels
    options |= {"width": config.width, "height": config.height}
    if kind == "image":  # Stable Video Diffusion has neither a prompt nor a VAE that slices
        options |= {"negative_prompt": config.negative_prompt, "vae_slicing": config.vae_slicing}
    prompt = config.prompts[index]
    return {
        **options, **more, "commit": model.commit, "prompt": prompt, "index": index,
        "seed": item_seed(config.seed, prompt, index),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip


def make_images(config: GenerateConfig, model: Model, checkpoint: CheckpointCallback) -> list[Output]:
    """One image for each prompt; those that are there are not made again."""
    pipe, made = None, []
    for index, prompt in enumerate(config.prompts):
        began, item = time.perf_counter(), Item(index + 1, "image", request("image", config, model, index))
        pixels = checkpoint.find(item)
        if pixels is not None:
            say(item, "was there")
        else:
            pipe = pipe or load_pipeline("image", model, config)
            # on the CPU: the same numbers whatever the device
            generator = torch.Generator().manual_seed(item.request["seed"])
            with checkpoint.making(item, pipe, generator):
                image = pipe(
                    prompt, negative_prompt=config.negative_prompt or None, width=config.width, height=config.height,
                    num_inference_steps=config.image_steps, guidance_scale=config.image_guidance, generator=generator,
                    callback_on_step_end=checkpoint,
                ).images[0]  # fmt: skip
            pixels = np.asarray(image)
            checkpoint.done(item, pixels)  # saves when due, or when asked to stop
            say(item, f"{time.perf_counter() - began:.1f} s")
        made.append((item, pixels))
    checkpoint.finish()
    return [Output.of(item, pixels, checkpoint) for item, pixels in made]


def make_clip(
    config: GenerateConfig, model: Model, index: int, image: np.ndarray, checkpoint: CheckpointCallback
) -> Output:
    """The clip that begins with the image of prompt ``index``."""
    began = time.perf_counter()
    wanted = request("video", config, model, index, image=pixels_digest(image))
    item = Item(len(config.prompts) + index + 1, "clip", wanted)
    pixels = checkpoint.find(item)
    if pixels is not None:
        say(item, "was there")
    else:
        pipe = load_pipeline("video", model, config)
        generator = torch.Generator().manual_seed(item.request["seed"])
        with checkpoint.making(item, pipe, generator):
            frames = pipe(
                Image.fromarray(image), width=config.width, height=config.height, num_frames=config.video_frames,
                num_inference_steps=config.video_steps, min_guidance_scale=config.video_min_guidance,
                max_guidance_scale=config.video_max_guidance, fps=config.video_fps,
                motion_bucket_id=config.video_motion_bucket, noise_aug_strength=config.video_noise,
                decode_chunk_size=config.video_decode_chunk, generator=generator, callback_on_step_end=checkpoint,
            ).frames[0]  # fmt: skip
        pixels = np.stack([np.asarray(frame) for frame in frames])
        checkpoint.done(item, pixels)
        say(item, f"{time.perf_counter() - began:.1f} s")
    checkpoint.finish()
    return Output.of(item, pixels, checkpoint)


def say(item: Item, how: str) -> None:
    about = item.request
    print(f"{item.kind} {about['index'] + 1}  seed {about['seed']:10}  {how:9}  {about['prompt']}", flush=True)


def write_video(frames: np.ndarray, path: Path, fps: int) -> Path:
    """An MP4 that browsers play, checked by decoding it."""
    # with the default macro_block_size ffmpeg would scale to multiples of 16
    export_to_video([Image.fromarray(frame) for frame in frames], str(path), fps=fps, macro_block_size=8)
    check_video(path, len(frames), (frames.shape[2], frames.shape[1]), fps)
    return path


def peak_memory() -> str:
    """The most that this process has used so far."""
    if torch.cuda.is_available():
        return f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


def download(repo: str, revision: str, variant: str) -> Model:
    """Into models/ of the working directory; the flow keeps it in Metaflow's datastore instead."""
    commit = hub.resolve(repo, revision)
    with hub.clear_errors(repo, commit):
        target = Path("models", f"{repo.replace('/', '--')}-{commit[:12]}")
        snapshot_download(
            repo, revision=commit, allow_patterns=patterns(variant), endpoint=hub.endpoint(repo), local_dir=target
        )
    return Model(target, commit)


def generate(config: GenerateConfig, checkpoints: CheckpointManager) -> GenerateResult:
    """All images, then all clips, in one process."""
    image_model = download(config.image_model, config.image_revision, config.image_variant)
    video_model = download(config.video_model, config.video_revision, config.video_variant)
    checkpoint = CheckpointCallback(checkpoints, every_steps=config.checkpoint_every_steps)
    commits = {"image_commit": image_model.commit, "video_commit": video_model.commit}
    checkpoint.restore({**config.what, **commits}, total_items=2 * len(config.prompts))
    images = make_images(config, image_model, checkpoint)
    clips = [make_clip(config, video_model, n, image.pixels, checkpoint) for n, image in enumerate(images)]

    history = [output.record for output in [*images, *clips]]
    path = checkpoints.directory / "outputs"
    path.mkdir()
    write_images(history[: len(images)], [image.pixels for image in images], path)
    for clip in clips:
        write_video(clip.pixels, path / file_name(clip.record), config.video_fps)
    print(peak_memory())
    return GenerateResult(path, history, outputs_digest(history))


if __name__ == "__main__":
    files = [argument for argument in sys.argv[1:] if argument != "--fresh"]
    with CheckpointManager(save_every=1, fresh="--fresh" in sys.argv) as checkpoints:
        result = generate(load(Path(files[0]).read_text() if files else None), checkpoints)
    shutil.copytree(result.path, "outputs", dirs_exist_ok=True)
    print(f"{len(result.history)} items in outputs/; {result.outputs_digest[:16]}")
