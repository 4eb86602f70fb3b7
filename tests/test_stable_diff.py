"""stable-diff/: settings, seeds, items that continue inside their denoising loop, video, card and cache."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gallery import REPO, Example, FlowRun, below, run_flow

from common import CheckpointError, CheckpointManager, StopRequested

EXAMPLE = Example(REPO / "stable-diff")
pytestmark = pytest.mark.xdist_group("stable-diff")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the environment has no imageio-ffmpeg")
SMALL = {"prompts": ("a red fox",), "image_steps": 4, "video_steps": 3, "video_frames": 4}


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The example's own modules can be imported."""
    sys.path.insert(0, str(EXAMPLE.path))
    yield
    sys.path.remove(str(EXAMPLE.path))
    for name in ("settings", "generate", "painting"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def generate(modules):
    return importlib.import_module("generate")


@pytest.fixture(scope="module")
def models(generate, tmp_path_factory):
    """Both tiny models, downloaded from the loopback hub."""
    directory = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        both = {kind: generate.download(f"local/tiny-{name}", "main", "") for kind, name in
                (("image", "sdxl"), ("video", "svd"))}  # fmt: skip
    return {kind: generate.Model(directory / model.path, model.commit) for kind, model in both.items()}


# -------------------------------------------------------------------- settings and seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_stepz: 3", "there is no key 'image_stepz'. There are: prompts, seed"),
        ("image_steps: six", "image_steps is 'six': give a whole number of 1 or more"),
        ("image_steps: 0", "image_steps is 0"),
        ("image_steps: true", "image_steps is True"),
        ("image_steps: 2.5", "image_steps is 2.5"),
        ("width: 100", "width is 100: give a whole number of 64 or more, a multiple of 8"),
        ("seed: -1", "seed is -1: give a whole number of 0 or more, or random"),
        ("seed: often", "seed is 'often'"),
        ("prompts: a fox", "prompts is 'a fox': give a list of texts"),
        ("prompts: []", "prompts is []"),
        ("image_scheduler: heun", "image_scheduler is 'heun': give 'euler' or 'euler_ancestral'"),
        ("video_fps: .nan", "video_fps is nan"),
        ("image_guidance: .inf", "image_guidance is inf: give a number of 0 or more"),
        ("cpu_offload: 1", "cpu_offload is 1: give true or false"),
        ("video_min_guidance: 4", "video_max_guidance is 3.0, which is less than video_min_guidance, 4.0"),
        ("- a", "write lines of `key: value`, not a list"),
        ("a: b: c", "this is not YAML"),
    ],
)
def test_bad_settings_are_refused_by_name(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        importlib.import_module("settings").load(text)


def test_settings():
    settings = importlib.import_module("settings")
    real = settings.load((EXAMPLE.path / "sdxl.yaml").read_text(), seed=7)
    assert (real.seed, real.video_frames, real.image_guidance) == (7, 14, 5.0) and real.image_model.startswith("stab")
    fp16 = settings.patterns("fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fp16 and "text_encoder_2/model.fp16.safetensors" in fp16
    assert not [pattern for pattern in fp16 if pattern.endswith((".bin", "*.safetensors"))]
    drawn = {settings.load("seed: random").seed for _ in range(5)}
    assert len(drawn) == 5, "random is not random"
    assert "checkpoint_every_steps" not in real.what, "how often is saved must not make a checkpoint another one's"


def test_the_seed_of_an_item_is_the_same_in_every_process():
    code = (
        "from settings import item_seed as s; fox = 'a fox'; "
        "print([s(0, fox, 0), s(1, fox, 0), s(0, 'a fax', 0), s(0, fox, 1), s(0, '1' + fox, 0)], hash(fox))"
    )
    answers = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLE.path, env=env, capture_output=True, text=True)
        answers.add(done.stdout)
    seeds = {answer.partition("]")[0] for answer in answers}
    assert len(answers) == 2, "hash() should have differed: this test would not notice it"
    assert len(seeds) == 1 and len(set(json.loads(seeds.pop() + "]"))) == 5


# -------------------------------------------------------------------- inside the denoising loop


class Killed(BaseException):
    """What ends an attempt here. The generic tests use SIGKILL; many attempts in one process are quicker."""


def attempt(generate, models, config, directory, die_after=None, stop_in=None):
    """One attempt at an image, or with video_frames > 4 at a clip.

    Dies after so many denoising steps, or is asked to stop in one.
    """
    from common.diffusers import CheckpointCallback

    steps = 0

    class Dying(CheckpointCallback):
        def __call__(self, *arguments):
            nonlocal steps
            if steps + 1 == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            answer = super().__call__(*arguments)
            steps += 1
            if steps == die_after:
                raise Killed
            return answer

    with CheckpointManager(directory, save_every=1) as checkpoints:
        callback = Dying(checkpoints, every_steps=config.checkpoint_every_steps)
        callback.restore(config.what, 1)
        if config.video_frames > 4:
            image = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
            return generate.make_clip(config, models["video"], 0, image, callback).pixels
        return generate.make_images(config, models["image"], callback)[0].pixels


@pytest.mark.parametrize(
    "options",
    [{"image_scheduler": "euler"}, {"image_scheduler": "euler_ancestral"}, {"video_frames": 5}],
    ids=["euler", "euler_ancestral", "video"],
)
def test_an_item_continues_at_every_denoising_step(generate, models, tmp_path, capsys, options):
    config = generate.GenerateConfig(**{**SMALL, **options}, checkpoint_every_steps=1)
    straight = attempt(generate, models, config, tmp_path / "straight")
    for steps in range(1, (config.video_steps if "video_frames" in options else config.image_steps) + 1):
        with pytest.raises(Killed):
            attempt(generate, models, config, tmp_path / str(steps), die_after=steps)
        capsys.readouterr()
        again = attempt(generate, models, config, tmp_path / str(steps))
        assert f"continues after denoising step {steps}" in capsys.readouterr().out
        assert np.array_equal(straight, again), f"killed after denoising step {steps}"


def test_asked_to_stop_it_saves_the_denoising_step_in_hand(generate, models, tmp_path, capsys):
    config = generate.GenerateConfig(**SMALL, image_scheduler="euler_ancestral")
    assert config.checkpoint_every_steps == 0
    straight = attempt(generate, models, config, tmp_path / "straight")
    with pytest.raises(StopRequested):
        attempt(generate, models, config, tmp_path / "stopped", stop_in=2)
    capsys.readouterr()
    again = attempt(generate, models, config, tmp_path / "stopped")
    assert "continues after denoising step 2" in capsys.readouterr().out
    assert np.array_equal(straight, again)


@pytest.mark.parametrize("lost", ["generator", "latents"])
def test_without_generator_or_latents_it_is_another_image(generate, models, tmp_path, monkeypatch, lost):
    """The negative control of the test above."""
    config = generate.GenerateConfig(**SMALL, image_scheduler="euler_ancestral", checkpoint_every_steps=1)
    straight = attempt(generate, models, config, tmp_path / "straight")
    with pytest.raises(Killed):
        attempt(generate, models, config, tmp_path / "again", die_after=2)
    import safetensors.torch as library
    import torch

    load = library.load_file

    def load_less(path, *arguments, **options):
        found = load(path, *arguments, **options)
        if Path(path).name == "latents.safetensors":
            fresh = torch.Generator().manual_seed(1).get_state() if lost == "generator" else found["latents"] * 1.01
            found[lost] = fresh
        return found

    monkeypatch.setattr(library, "load_file", load_less)
    assert not np.array_equal(straight, attempt(generate, models, config, tmp_path / "again"))


def test_killed_between_two_frames(generate, models, tmp_path, monkeypatch, capsys):
    """All denoising is done, one of the frames is decoded: only the decoding is done again."""
    config = generate.GenerateConfig(**{**SMALL, "video_frames": 5}, checkpoint_every_steps=1, video_decode_chunk=1)
    straight = attempt(generate, models, config, tmp_path / "straight")
    vae = importlib.import_module("diffusers").AutoencoderKLTemporalDecoder
    decode, frames = vae.decode, []

    def dying(self, *arguments, **options):
        frames.append(1)
        if len(frames) == 3:
            raise Killed
        return decode(self, *arguments, **options)

    monkeypatch.setattr(vae, "decode", dying)
    with pytest.raises(Killed):
        attempt(generate, models, config, tmp_path / "killed")
    capsys.readouterr()
    assert np.array_equal(straight, attempt(generate, models, config, tmp_path / "killed"))
    assert "continues after denoising step 3" in capsys.readouterr().out


def test_a_scheduler_with_a_memory_is_refused(generate, models, tmp_path, monkeypatch):
    heun = importlib.import_module("diffusers").HeunDiscreteScheduler
    monkeypatch.setitem(generate.SCHEDULERS, "euler", heun)
    config = generate.GenerateConfig(**SMALL, checkpoint_every_steps=1)
    with pytest.raises(CheckpointError, match="HeunDiscreteScheduler cannot continue inside of an item"):
        attempt(generate, models, config, tmp_path)


def test_a_damaged_image_is_made_again_and_only_that_one(generate, models, tmp_path, capsys):
    config = generate.GenerateConfig(**{**SMALL, "prompts": ("a", "b", "c")})
    straight = attempt(generate, models, config, tmp_path)
    victims = [path for path in tmp_path.glob("image-*") if '"prompt": "a"' in (path / "item.json").read_text()]
    pixels = victims[0] / "pixels.safetensors"
    data = bytearray(pixels.read_bytes())
    data[-1] ^= 1
    pixels.write_bytes(data)
    capsys.readouterr()
    again = attempt(generate, models, config, tmp_path)
    said = capsys.readouterr().out
    assert "is not used: pixels.safetensors: its hash differs" in said and said.count("was there") == 2
    assert np.array_equal(straight, again)


# -------------------------------------------------------------------- video


def test_the_settings_of_the_real_models_fit_their_pipelines(generate, models, monkeypatch):
    """The tiny ones have the same classes; a switch that one of them lacks fails when the pipeline is loaded."""
    real = importlib.import_module("settings").load((EXAMPLE.path / "sdxl.yaml").read_text())
    config = generate.GenerateConfig(**SMALL, vae_slicing=real.vae_slicing,
                                     video_forward_chunking=real.video_forward_chunking)  # fmt: skip
    assert config.vae_slicing and config.video_forward_chunking
    assert generate.load_pipeline("image", models["image"], config).vae.use_slicing
    generate.load_pipeline("video", models["video"], config)
    assert "vae_slicing" in generate.request("image", config, models["image"], 0)
    assert "vae_slicing" not in generate.request("video", config, models["video"], 0)


def test_the_mp4_is_what_was_asked_for(generate, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 72, 104, 3), dtype=np.uint8)  # no multiples of 16
    path = generate.write_video(frames, tmp_path / "clip.mp4", fps=7)
    about = next(imageio_ffmpeg.read_frames(str(path)))
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p") and about["source_size"] == (104, 72)


def test_a_video_that_browsers_do_not_play_is_refused(generate, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "clip.mp4"
    for options, wrong in (
        ({"pix_fmt_out": "yuv444p"}, "yuv444p"),
        ({"fps": 5}, "5.0"),
        ({"macro_block_size": 48}, "(96, 96)"),
    ):
        writer = imageio_ffmpeg.write_frames(str(path), (64, 64), **{"fps": 7, **options})
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()
        with pytest.raises(ValueError, match=re.escape(wrong)):
            generate.check_video(path, 6, (64, 64), 7)


# -------------------------------------------------------------------- the flow


@pytest.fixture(scope="module")
def killed_run() -> FlowRun:
    """A seed that was drawn, a kill at the first clip."""
    arguments = ["--prompts", "a red fox|a boat <at> night", "--checkpoint-every-steps", "2", "--seed", "random"]
    run = run_flow(EXAMPLE, *arguments, faults="kill@step=3")
    assert run.fired() == ["kill@step=3"], run.output[-3000:]
    return run


def test_a_random_seed_is_drawn_once(generate, killed_run, tmp_path, monkeypatch):
    data = killed_run.data
    assert killed_run.output.count("the seed that was drawn: ") == 1
    assert f"the seed that was drawn: {data.config['seed']}" in killed_run.output
    assert data.resumed_from == [2]
    assert re.search(
        "the clip continues after denoising step [24]", killed_run.output
    )  # a kill may take a save with it
    assert "peak memory" in killed_run.output
    monkeypatch.chdir(tmp_path)
    with CheckpointManager(tmp_path / "checkpoints", save_every=1) as checkpoints:
        straight = generate.generate(generate.GenerateConfig(**data.config), checkpoints)
    assert straight.history == data.history
    assert straight.outputs_digest == data.outputs_digest


def test_the_cache_is_verified_before_use(killed_run):
    """Another run takes what the first has made; one of its images is damaged, and is made again."""
    data = killed_run.data
    root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow/mf.checkpoints")
    (damaged,) = [
        path for path in below(root, "pixels.safetensors")
        if path.parent.name in data.references[0]["key"]
    ]  # fmt: skip
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    arguments = ["--prompts", "a red fox|a boat <at> night", "--seed", str(data.config["seed"]), "--reuse", "true"]
    run = run_flow(EXAMPLE, *arguments)
    assert run.output.count("is not used: ") == 1 and run.output.count(": found in StableDiffFlow/") == 3, run.output
    assert "not found in datastore, downloading" not in run.output, "a model was downloaded again"
    assert run.data.history == data.history and run.data.outputs_digest == data.outputs_digest
    assert {record["pathspec"].split("/")[1] for record in run.data.references} == {run.run_id}, "not this run's own"


def test_clips_continue_those_of_a_run_that_got_to_them(killed_run):
    arguments = ["--prompts", "a red fox|a boat <at> night", "--checkpoint-every-steps", "2"]
    arguments += ["--seed", str(killed_run.data.config["seed"]), "--resume-from", killed_run.run_id]
    run = run_flow(EXAMPLE, *arguments)
    assert run.data.resumed_from == [2, 3, 4] and "to continue from" not in run.output
    assert run.data.outputs_digest == killed_run.data.outputs_digest


def test_clips_of_a_run_that_died_in_the_images_begin_at_zero():
    arguments = ["--prompts", "a red fox|a boat"]
    faults = ";".join(f"kill@step=2,attempt={number}" for number in range(5))  # of all its attempts
    died = run_flow(EXAMPLE, *arguments, faults=faults, check=False)
    assert died.returncode and not died.events("clip"), died.output[-3000:]
    run = run_flow(EXAMPLE, *arguments, "--resume-from", died.run_id)
    assert run.data.resumed_from == [1]
    for number in (1, 2):
        assert f"{died.run_id} has no checkpoint of clip {number} to continue from" in run.output


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    return found


PROBE = """<script>setInterval(() => document.documentElement.setAttribute("data-seen", JSON.stringify({
videos: [...document.querySelectorAll("video")].map(v => [v.videoWidth, v.videoHeight, v.error && v.error.message]),
images: [...document.querySelectorAll("figure img")].map(i => [i.naturalWidth, i.naturalHeight]),
text: [...document.querySelectorAll("figcaption")].map(f => f.textContent)})), 100)</script>"""


def test_a_browser_plays_the_card(killed_run, tmp_path):
    chromium = browser()
    root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    (card,) = below(root, f"{killed_run.run_id}/steps/paint/**/blank-gallery-*.html")
    page = tmp_path / "card.html"
    page.write_text(card.read_text() + PROBE)
    line = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=8000",
        f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["videos"] == [[64, 64, None]] * 2 and seen["images"] == [[64, 64]] * 2
    for record, text in zip(killed_run.data.history, seen["text"], strict=False):
        assert record["prompt"] in text and str(record["seed"]) in text
