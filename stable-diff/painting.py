"""What becomes of the pixels: files, a card, and the checks of both. Needs neither diffusers nor a GPU."""

import base64
import hashlib
import html
import io
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from common import weights_digest

STYLE = """<style>
.mf-card .clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:24px}
.mf-card figure{margin:0} .mf-card figure div{display:flex;gap:8px}
.mf-card figure img,.mf-card figure video{width:50%;border-radius:6px;background:#8882}
.mf-card .small{image-rendering:pixelated} .mf-card figcaption{font-size:14px;line-height:1.4;margin-top:6px}
.mf-card figcaption i{color:#888}
</style>"""


def pixels_digest(pixels: np.ndarray) -> str:
    """SHA-256 over shape and values."""
    return weights_digest({"pixels": pixels})


def outputs_digest(history: list[dict]) -> str:
    """SHA-256 over the digests of all decoded images and clips, in order."""
    return hashlib.sha256("".join(record["digest"] for record in history).encode()).hexdigest()


def file_name(record: dict) -> str:
    return f"{record['index'] + 1:03d}.{'png' if record['kind'] == 'image' else 'mp4'}"


def write_images(history: list[dict], pixels: list[np.ndarray], directory: Path) -> None:
    """The images as PNG, which keeps every pixel."""
    for record, image in zip(history, pixels, strict=True):
        if record["kind"] == "image":
            Image.fromarray(image).save(directory / file_name(record))


def check_video(path: Path, frames: int, size: tuple[int, int], fps: int) -> None:
    """Decode an MP4. Raises ValueError when it is not what was asked for, or browsers may not play it.

    Args:
        path: the file.
        frames: how many there should be.
        size: width and height in pixels.
        fps: frames per second.
    """
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    found = {
        "codec": about["codec"], "pixels": about["pix_fmt"].partition("(")[0], "size": tuple(about["source_size"]),
        "fps": about["fps"], "frames": sum(1 for _ in reader),
    }  # fmt: skip
    wanted = {"codec": "h264", "pixels": "yuv420p", "size": size, "fps": float(fps), "frames": frames}
    if found != wanted:
        raise ValueError(f"{path.name} is {found}, but it should be {wanted}")


def check_files(directory: str, history: list[dict], config: dict) -> str:
    """Decode every file: PNGs must have the pixels of the history, MP4s their frames. Returns a line about them."""
    counts = {"image": 0, "clip": 0}
    for record in history:
        path = Path(directory, file_name(record))
        counts[record["kind"]] += 1
        if record["kind"] == "clip":
            check_video(path, config["video_frames"], (config["width"], config["height"]), config["video_fps"])
        elif pixels_digest(np.asarray(Image.open(path))) != record["digest"]:
            raise ValueError(f"{path.name} does not have the pixels that were made for {record['prompt']!r}")
    return f"{counts['image']} images and {counts['clip']} clips of {config['video_frames']} frames are whole"


def gallery(history: list[dict], directory: Path):
    """Each image beside its clip, with prompt and seed, as a card component."""
    from metaflow.cards import Markdown

    images = [record for record in history if record["kind"] == "image"]
    figures = []
    for record in images:
        image = Image.open(directory / file_name(record))
        small = ' class="small"' if image.width < 256 else ""
        image.thumbnail((768, 768))
        buffer = io.BytesIO()
        kind = "png" if small else "webp"
        image.save(buffer, kind)
        video = (directory / file_name({**record, "kind": "clip"})).read_bytes()
        figures.append(
            f'<figure><div><img{small} src="{_inline(f"image/{kind}", buffer.getvalue())}">'
            f'<video{small} controls autoplay loop muted src="{_inline("video/mp4", video)}"></video></div>'
            f"<figcaption>{html.escape(record['prompt'])}<br><i>seed {record['seed']}</i></figcaption></figure>"
        )
    return Markdown(f'{STYLE}\n\n## {len(images)} prompts\n\n<div class="clips">{"".join(figures)}</div>')


def _inline(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
