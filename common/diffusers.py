"""Diffusers: what pipelines make is kept item by item, and an item continues inside its denoising loop::

    checkpoint = CheckpointCallback(checkpoints, every_steps=10)
    checkpoint.restore(config, total_items=len(requests))
    for number, request in enumerate(requests, start=1):
        item = Item(number, "image", request)  # request: all that the pixels depend on
        pixels = checkpoint.find(item)  # made before the kill, verified; or None
        if pixels is None:
            generator = torch.Generator().manual_seed(request["seed"])
            with checkpoint.making(item, pipe, generator):
                output = pipe(request["prompt"], generator=generator, callback_on_step_end=checkpoint)
            checkpoint.done(item, numpy.asarray(output.images[0]))
    checkpoint.finish()

Each finished item is one checkpoint, named after its request, so what is kept grows by an item at a time. An unfinished
one is its latents, its place in the loop and its generator's state.

A pipeline cannot be started in the middle of its loop. Here it walks through the steps that are done with its UNet left
out, which costs next to nothing, and then gets the saved latents and generator state through the callback that it has
for that. Text encoders, noise, schedule and scheduler are set up by the pipeline itself, as in a run that was never
interrupted, so nothing of that has to be saved or known here.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointManager
from .errors import CheckpointError, InvalidCheckpoint, WriteFailed
from .manifest import Manifest, verify

PIXELS, LATENTS, ABOUT = "pixels.safetensors", "latents.safetensors", "item.json"

# schedulers whose steps know nothing but their place, so that a loop can be entered anywhere; others remember outputs
CONTINUABLE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclass(frozen=True)
class Item:
    """One image or clip.

    Attributes:
        step: its number in the whole job, from 1: what FAULTS and the history count.
        kind: such as ``"image"``.
        request: all that its pixels depend on, as plain values. Two items with equal requests are equal.
    """

    step: int
    kind: str
    request: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its checkpoint: the kind and a hash of the request."""
        text = json.dumps({"kind": self.kind, **self.request}, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    @property
    def about(self) -> dict[str, Any]:
        """What is stored with the pixels."""
        return {"kind": self.kind, "request": dict(self.request)}


def read_pixels(directory: str | os.PathLike[str]) -> Any:
    """The pixels of a finished item's checkpoint, verified: a uint8 array (height, width, 3) or (frames, ...).

    Raises InvalidCheckpoint when a file is not what the manifest says.
    """
    verify(Path(directory), Manifest.read(Path(directory)))
    return _read_pixels(Path(directory))


def _read_pixels(directory: Path) -> Any:
    return import_module("safetensors.numpy").load_file(directory / PIXELS)["pixels"]


class CheckpointCallback:
    """Pass it to pipelines as ``callback_on_step_end``; see the module's example.

    Args:
        checkpoints: the manager; its ``save_every`` counts items.
        every_steps: save the unfinished item after so many denoising steps, too; 0: only when asked to stop.
        finished: returns the references of the checkpoints of this task, such as ``current.checkpoint.list``. With a
            directory as the manager's place it is not needed.
        cache: returns references of checkpoints of any task, such as
            ``lambda: current.checkpoint.list(full_namespace=True)``: an item that one of them holds is verified, copied
            to this task, and not made again. None: no other task's.

    Attributes:
        references: of the items found or done, by name.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        *,
        every_steps: int = 0,
        finished: Callable[[], Iterable[Any]] | None = None,
        cache: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        if every_steps < 0:
            raise CheckpointError(f"every_steps is {every_steps}: give a number of denoising steps, or 0 for none")
        self._checkpoints, self._every = checkpoints, every_steps
        self._finished, self._cache = finished, cache
        self.references: dict[str, Any] = {}
        self._own: dict[str, list[Any]] = {}  # name -> references, newest first
        self._others: dict[str, list[Any]] | None = None
        self._pending: list[tuple[Item, Path]] = []  # done, and waiting to be saved
        self._unfinished: tuple[str, int, Path] | None = None  # of the attempt before: name, steps done, files
        # the item in hand
        self._item: Item | None = None
        self._generator: Any = None
        self._skip = self._done = 0
        self._saved: dict[str, Any] = {}
        self._wake: Callable[[], None] = lambda: None

    def restore(self, config: Any, total_items: int) -> None:
        """Look for what is there and say so in one line. Arguments and errors as for ``CheckpointManager.restore``."""
        found = self._checkpoints.restore_files(config, total_steps=total_items)
        if found is not None and (found / LATENTS).exists():
            about = json.loads((found / ABOUT).read_text())
            self._unfinished = about["name"], about["denoising_steps"], found
        references = self._finished() if self._finished else self._in_directory()
        self._own = _by_name(references)

    def _in_directory(self) -> Iterable[str]:
        latest = self._checkpoints.latest
        if not isinstance(latest, str):
            return []
        paths = [path for path in Path(latest).parent.glob("*") if (path / ABOUT).exists()]
        return [str(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)]

    # ---------------------------------------------------------------- finished items

    def find(self, item: Item) -> Any:
        """The item's pixels if this task, or one in the cache, has made them and they are whole; else None."""
        for reference in self._own.get(item.name, []):
            pixels = self._load(item, reference)
            if pixels is not None:
                self.references[item.name] = reference
                return pixels
        if self._cache is not None:
            if self._others is None:
                self._others = _by_name(self._cache())
            for reference in self._others.get(item.name, []):
                pixels = self._load(item, reference)
                if pixels is not None:
                    print(f"[checkpoints] {item.kind} of step {item.step}: found in {_where(reference)}", flush=True)
                    self.done(item, pixels)  # so that it outlives that other run
                    return pixels
        return None

    def _load(self, item: Item, reference: Any) -> Any:
        try:
            directory = self._checkpoints.load_files(reference)
            if not (directory / PIXELS).exists() or json.loads((directory / ABOUT).read_text()) != item.about:
                raise InvalidCheckpoint(f"it does not hold the {item.kind} that its name says")
        except WriteFailed:
            raise
        except Exception as error:  # whatever a datastore says about a checkpoint that is not whole
            print(
                f"[checkpoints] {item.kind} of step {item.step} in {_where(reference)} is not used: {error}", flush=True
            )
            return None
        pixels = _read_pixels(directory)
        shutil.rmtree(directory)
        return pixels

    def done(self, item: Item, pixels: Any) -> None:
        """Keep a finished item: a uint8 array (height, width, 3), or (frames, height, width, 3).

        Raises as ``CheckpointManager.step`` does.
        """
        numpy: Any = import_module("numpy")
        if pixels.dtype != numpy.uint8:
            raise CheckpointError(f"the pixels of the {item.kind} are {pixels.dtype}: give uint8, from 0 to 255")
        directory = self._fresh_directory("done")
        import_module("safetensors.numpy").save_file(
            {"pixels": numpy.ascontiguousarray(pixels)}, directory / PIXELS, metadata={"format": "pt"}
        )
        (directory / ABOUT).write_text(json.dumps(item.about, sort_keys=True))
        self._pending.append((item, directory))
        self._checkpoints.boundary(item.step, self._save_pending)

    def finish(self) -> None:
        """All items are done: save those that are not."""
        self._checkpoints.epoch_boundary({}, self._save_pending, last=True)

    def _save_pending(self) -> None:
        while self._pending:
            item, directory = self._pending[0]
            self._checkpoints.save_files(directory, step=item.step, name=item.name)
            self.references[item.name] = self._checkpoints.latest  # on disk before the next item begins
            self._pending.pop(0)
            shutil.rmtree(directory)

    # ---------------------------------------------------------------- the unfinished item

    @contextlib.contextmanager
    def making(self, item: Item, pipe: Any, generator: Any) -> Generator[None]:
        """Around the pipeline's call: continues the item where the attempt before was killed, if it was this one.

        Args:
            item: what is made.
            pipe: a pipeline with a ``unet``, a ``scheduler`` and ``callback_on_step_end``.
            generator: the ``torch.Generator`` given to the pipeline, freshly seeded: its only source of random numbers.

        Raises:
            CheckpointError: the scheduler keeps more than its place, so the loop cannot be entered in the middle.
        """
        scheduler = type(pipe.scheduler).__name__
        continuable = scheduler in CONTINUABLE
        if self._every and not continuable:
            raise CheckpointError(
                f"checkpoint-every-steps is {self._every}, but the pipeline's {scheduler} cannot continue inside of an "
                f"item: choose {' or '.join(CONTINUABLE)}, or 0, which makes an unfinished item again from its start"
            )
        self._item, self._generator = (item if continuable else None), generator
        self._skip = self._done = 0
        unfinished, self._unfinished = self._unfinished, None
        if continuable and unfinished is not None and unfinished[0] == item.name:
            self._skip = unfinished[1]
            self._saved = import_module("safetensors.torch").load_file(unfinished[2] / LATENTS)
            print(f"[checkpoints] the {item.kind} continues after denoising step {self._skip}", flush=True)
            self._wake = _leave_out(pipe.unet)
        try:
            yield
        finally:
            self._wake()
            self._wake, self._saved, self._item = (lambda: None), {}, None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """``callback_on_step_end`` of diffusers."""
        if self._item is None:
            return tensors
        if step + 1 < self._skip:
            return tensors  # this step was done in the attempt before
        latents = tensors["latents"]
        if step + 1 == self._skip:
            self._wake()
            self._generator.set_state(self._saved["generator"])
            return {**tensors, "latents": self._saved["latents"].to(latents.device)}
        if self._every and (step + 1) % self._every == 0:
            self._save_unfinished(step + 1, latents)
        self._checkpoints.stop_if_asked(lambda: self._save_unfinished(step + 1, latents))
        return tensors

    def _save_unfinished(self, steps: int, latents: Any) -> None:
        item = self._item
        if item is None or self._done == steps:
            return
        self._save_pending()
        directory = self._fresh_directory("unfinished")
        state = {"latents": latents.detach().cpu().contiguous(), "generator": self._generator.get_state()}
        import_module("safetensors.torch").save_file(state, directory / LATENTS)
        about = {"name": item.name, "denoising_steps": steps}
        (directory / ABOUT).write_text(json.dumps(about))
        self._checkpoints.save_files(directory, step=item.step - 1)
        shutil.rmtree(directory)
        self._done = steps

    def _fresh_directory(self, name: str) -> Path:
        directory = self._checkpoints.directory / f"{name}-{len(self._pending)}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory


def _leave_out(unet: Any) -> Callable[[], None]:
    """Let a UNet answer zeros at once. Returns what puts it back; calling that again does nothing."""
    torch: Any = import_module("torch")
    before = unet.__dict__.get("forward")  # set on the instance where accelerate moves the model between devices

    def zeros(sample: Any, *_: Any, **__: Any) -> tuple[Any]:
        # an inpainting or video model gets more channels than it returns: (..., channels, height, width)
        return (torch.zeros_like(sample[..., : unet.config.out_channels, :, :]),)

    unet.forward = zeros

    def put_back() -> None:
        if unet.forward is zeros:
            if before is None:
                del unet.forward
            else:
                unet.forward = before

    return put_back


def _by_name(references: Iterable[Any]) -> dict[str, list[Any]]:
    """References by the name of what they hold, the newest first."""
    found: dict[str, list[Any]] = {}

    def created(reference: Any) -> str:
        return "" if isinstance(reference, str) else str(reference["created_on"])

    for reference in sorted(references, key=created, reverse=True):  # stable: paths stay as they are
        # of a directory: a second one of the name ends in -2
        name = "-".join(Path(reference).name.split("-")[:2]) if isinstance(reference, str) else str(reference["name"])
        found.setdefault(name, []).append(reference)
    return found


def _where(reference: Any) -> str:
    return reference if isinstance(reference, str) else f"{reference['pathspec']} attempt {reference['attempt']}"
