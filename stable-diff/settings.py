"""The settings: typed, with defaults, from YAML. Errors name the key and the value, and say what to give instead."""

import hashlib
import secrets
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml

_PROMPTS = ("a red fox in the snow", "a boat on a lake at night", "an old lighthouse", "a street after the rain")
# how something is made, but not what
_HOW = ("cpu_offload", "checkpoint_every_steps")


def _key(default: Any, low: float | None = None, multiple: int = 1, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"low": low, "multiple": multiple, "choices": choices})


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that the images and clips depend on, and, last, how they are made.

    Raises ValueError, with the key, for anything of another type or out of range.
    """

    prompts: tuple[str, ...] = _PROMPTS  # one image and one clip each
    seed: int = _key(0, low=0)
    width: int = _key(64, low=64, multiple=8)  # pixels, of images and clips
    height: int = _key(64, low=64, multiple=8)
    negative_prompt: str = ""

    image_model: str = "local/tiny-sdxl"  # built on the spot; its images are noise
    image_revision: str = "main"  # a branch or a tag; resolved to a commit once
    image_variant: str = _key("", choices=("", "fp16"))  # of the files to download
    image_steps: int = _key(6, low=1)
    image_guidance: float = _key(5.0, low=0)
    image_scheduler: str = _key("euler", choices=("euler", "euler_ancestral"))

    video_model: str = "local/tiny-svd"
    video_revision: str = "main"
    video_variant: str = _key("", choices=("", "fp16"))
    video_steps: int = _key(4, low=1)
    video_min_guidance: float = _key(1.0, low=1)  # of the first frame
    video_max_guidance: float = _key(3.0, low=1)  # of the last
    video_frames: int = _key(8, low=2)
    video_fps: int = _key(7, low=1)
    video_motion_bucket: int = _key(127, low=0)  # more is more motion
    video_noise: float = _key(0.02, low=0)  # added to the image: more is less like it
    video_decode_chunk: int = _key(2, low=1)  # frames decoded together: fewer need less memory

    video_forward_chunking: bool = False  # less memory, more time

    vae_slicing: bool = False  # of images: decode one of a batch at a time; the video model has no such switch
    cpu_offload: bool = True  # on a GPU: only the part of the pipeline that is at work lies there
    checkpoint_every_steps: int = _key(0, low=0)  # save an unfinished item after so many denoising steps; 0: never

    def __post_init__(self) -> None:
        for key in fields(self):
            object.__setattr__(self, key.name, _checked(key, getattr(self, key.name)))
        if self.video_max_guidance < self.video_min_guidance:
            raise ValueError(
                f"settings: video_max_guidance is {self.video_max_guidance}, which is less than video_min_guidance, "
                f"{self.video_min_guidance}"
            )

    @property
    def what(self) -> dict[str, Any]:
        """Without how it is made: a checkpoint made under other values of these is refused."""
        return {key: value for key, value in asdict(self).items() if key not in _HOW}


def load(text: str | None = None, **given: Any) -> GenerateConfig:
    """The defaults, overridden by a YAML text, overridden by what is ``given`` and not None.

    A seed of ``"random"`` is drawn here, once: keep the configuration and use it for every retry.

    Raises ValueError for a text that is not a mapping, unknown keys and bad values.
    """
    try:
        values = yaml.safe_load(text or "") or {}
    except yaml.YAMLError as error:
        raise ValueError(f"settings: this is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"settings: write lines of `key: value`, not a {type(values).__name__}")
    values |= {key: value for key, value in given.items() if value is not None}
    known = [key.name for key in fields(GenerateConfig)]
    for key in values:
        if key not in known:
            raise ValueError(f"settings: there is no key {key!r}. There are: {', '.join(known)}")
    if values.get("seed") == "random":
        values["seed"] = secrets.randbelow(2**32)
        print(f"the seed that was drawn: {values['seed']}", flush=True)
    return GenerateConfig(**values)


def _checked(key: Any, value: Any) -> Any:
    def refuse(wanted: str) -> ValueError:
        return ValueError(f"settings: {key.name} is {value!r}: give {wanted}")

    if key.name == "prompts":
        texts = list(value) if isinstance(value, (list, tuple)) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise refuse("a list of texts")
        return tuple(texts)
    if key.type is bool:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if key.type is str:
        if not isinstance(value, str):
            raise refuse("a text")
        choices = key.metadata.get("choices")
        if choices and value not in choices:
            raise refuse(" or ".join(repr(choice) for choice in choices))
        return value
    low, multiple = key.metadata["low"], key.metadata["multiple"]
    kind = "a whole number" if key.type is int else "a number"
    wanted = f"{kind} of {low} or more" + (f", a multiple of {multiple}" if multiple > 1 else "")
    right = isinstance(value, int if key.type is int else (int, float)) and not isinstance(value, bool)
    if not right or not value >= low or value % multiple * (multiple > 1) or value == float("inf"):
        raise refuse(wanted + (", or random" if key.name == "seed" else ""))
    return key.type(value)


def item_seed(seed: int, prompt: str, index: int) -> int:
    """A pure function, the same in every process; Python's hash() of a string is another one in each."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:4])


def patterns(variant: str) -> list[str]:
    """What to download of a pipeline: the safetensors of one variant, without the copies in other formats."""
    dot = f".{variant}" if variant else ""
    weights = [f"{part}/diffusion_pytorch_model{dot}.safetensors" for part in ("unet", "vae")]
    weights += [f"{part}/model{dot}.safetensors" for part in ("text_encoder", "text_encoder_2", "image_encoder")]
    return ["model_index.json", "*/*.json", "tokenizer*/merges.txt", *weights]
