"""Text to images to video with diffusers, as a Metaflow flow that loses no image and no frame.

python stable-diff/flow.py run
FAULTS=kill@step=3 python stable-diff/flow.py run      # see it die in image 3 of 4 and come back
"""

from metaflow import (
    FlowSpec,
    IncludeFile,
    Parameter,
    card,
    checkpoint,
    current,
    huggingface_hub,
    model,
    resources,
    retry,
    step,
)

import common  # at the top on purpose: this is how Metaflow knows to package it for remote tasks


class StableDiffFlow(FlowSpec):
    settings = IncludeFile("settings", required=False, help="a YAML file, such as stable-diff/sdxl.yaml")
    prompts = Parameter("prompts", default="", help="instead of the settings', separated by |")
    seed = Parameter("seed", default="", help="instead of the settings': a whole number, or random")
    every_steps = Parameter("checkpoint-every-steps", default="", help="save an unfinished item, too; 0: never")
    reuse = Parameter("reuse", default=False, help="take what any run has made with the same model and options")
    save_every = Parameter("save-every", default="1", help="items (1), time (10m) or both (5,10m)")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @step
    def start(self):
        from dataclasses import asdict

        from settings import load

        # bad settings are refused here, before anything is written; a random seed is drawn here, and only here
        given = {"prompts": self.prompts.split("|") if self.prompts else None}
        for key, text in (("seed", self.seed), ("checkpoint_every_steps", self.every_steps)):
            given[key] = int(text) if text.isdigit() else text or None
        self.config = asdict(load(self.settings, **given))
        self.next(self.fetch_image_model, self.fetch_video_model)

    @retry(times=4, minutes_between_retries=0)
    @huggingface_hub(cache_scope="flow")  # one download for ever: the next run takes it from the datastore
    @step
    def fetch_image_model(self):
        self.fetch("image")
        self.next(self.models)

    @retry(times=4, minutes_between_retries=0)
    @huggingface_hub(cache_scope="flow")
    @step
    def fetch_video_model(self):
        self.fetch("video")
        self.next(self.models)

    def fetch(self, kind):
        from settings import patterns

        repo, revision, variant = (self.config[f"{kind}_{key}"] for key in ("model", "revision", "variant"))
        self.commit = common.hub.resolve(repo, revision)  # kept as an artifact, and used from then on
        with common.hub.clear_errors(repo, self.commit):
            self.model = current.huggingface_hub.snapshot_download(
                repo_id=repo,
                revision=self.commit,
                allow_patterns=patterns(variant),
                endpoint=common.hub.endpoint(repo),
            )
        print(f"{repo} at commit {self.commit}")

    @retry(times=4, minutes_between_retries=0)
    @step
    def models(self, inputs):
        self.config = inputs.fetch_image_model.config
        self.image_model, self.image_commit = inputs.fetch_image_model.model, inputs.fetch_image_model.commit
        self.video_model, self.video_commit = inputs.fetch_video_model.model, inputs.fetch_video_model.commit
        self.next(self.images)

    @resources(cpu=2, memory=16000)
    @retry(times=4, minutes_between_retries=0)
    @model(load=["image_model"])
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def images(self):
        from generate import GenerateConfig, Model, make_images, peak_memory

        config = GenerateConfig(**self.config)
        with self.manager(self.resume_from) as checkpoints:
            callback = self.callback(checkpoints, config, total_items=len(config.prompts))
            source = Model(current.model.loaded["image_model"], self.image_commit)
            outputs = make_images(config, source, callback)

        self.history = [output.record for output in outputs]
        self.references = [output.reference for output in outputs]  # to what Metaflow's own API loads, too
        self.resumed_from, self.latest_checkpoint = checkpoints.resumed_from, checkpoints.latest
        self.indices = list(range(len(outputs)))
        print(peak_memory())
        self.next(self.clip, foreach="indices")

    @resources(cpu=2, memory=16000)
    @retry(times=4, minutes_between_retries=0)
    @model(load=["video_model"])
    @checkpoint(load_policy="none", show_card=False)
    @step
    def clip(self):
        from generate import GenerateConfig, Model, make_clip, peak_memory, write_video

        from common.diffusers import read_pixels

        config = GenerateConfig(**self.config)
        with self.manager(self.reached()) as checkpoints:
            callback = self.callback(checkpoints, config, total_items=len(self.indices) + self.input + 1)
            image = read_pixels(current.model.load(self.references[self.input]))
            source = Model(current.model.loaded["video_model"], self.video_commit)
            output = make_clip(config, source, self.input, image, callback)

        self.number, self.record, self.reference = self.input, output.record, output.reference
        self.resumed, self.latest = checkpoints.resumed_from, checkpoints.latest
        self.mp4 = write_video(output.pixels, checkpoints.directory / "clip.mp4", config.video_fps).read_bytes()
        print(peak_memory())
        self.next(self.paint)

    @card(type="blank", id="gallery")
    @retry(times=4, minutes_between_retries=0)
    @model
    @step
    def paint(self, inputs):
        from pathlib import Path
        from tempfile import TemporaryDirectory

        from painting import file_name, gallery, outputs_digest, write_images

        from common.diffusers import read_pixels

        clips = sorted(inputs, key=lambda clip: clip.number)
        self.merge_artifacts(inputs, include=["config", "image_commit", "video_commit"])
        self.history = clips[0].history + [clip.record for clip in clips]
        self.references = clips[0].references + [clip.reference for clip in clips]
        self.resumed_from = sum((clip.resumed for clip in clips), clips[0].resumed_from)
        self.latest_checkpoint = clips[-1].latest
        self.outputs_digest = outputs_digest(self.history)
        images = [read_pixels(current.model.load(reference)) for reference in clips[0].references]
        with TemporaryDirectory() as name:
            directory = Path(name)
            write_images(clips[0].history, images, directory)
            for clip in clips:
                (directory / file_name(clip.record)).write_bytes(clip.mp4)
            current.card["gallery"].append(gallery(self.history, directory))
            self.outputs = current.model.save(name, label="stable_diff")
        self.next(self.end)

    @model(load="outputs")  # by the artifact's name
    @step
    def end(self):
        from painting import check_files

        print(check_files(current.model.loaded["outputs"], self.history, self.config))
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{len(self.history)} items, seed {self.config['seed']}{resumed}; outputs {self.outputs_digest[:16]}")

    def reached(self):
        """``resume_from``, if that run has a checkpoint of this clip; "" if it died before: begin at zero then."""
        run, _, step = self.resume_from.rpartition("/")[2].partition("@")
        for reference in current.checkpoint.list(full_namespace=True):  # of this clip, of all runs
            if reference["pathspec"].split("/")[1] == run and step in ("", str(reference["metadata"]["step"])):
                return self.resume_from
        if run:
            clip = f"clip {self.input + 1}"
            print(f"[checkpoints] {self.resume_from} has no checkpoint of {clip} to continue from", flush=True)
        return ""

    def manager(self, resume_from):
        return common.CheckpointManager(
            current.checkpoint,
            save_every=self.save_every,
            resume_from=resume_from,
            allow_changes=self.allow_changes,
            exact=self.exact,
        )

    def callback(self, checkpoints, config, total_items):
        from common.diffusers import CheckpointCallback

        everywhere = self.reuse or self.resume_from or current.origin_run_id
        callback = CheckpointCallback(
            checkpoints,
            every_steps=config.checkpoint_every_steps,
            finished=current.checkpoint.list,  # of this task, of all attempts
            cache=(lambda: current.checkpoint.list(full_namespace=True)) if everywhere else None,
        )
        commits = {"image_commit": self.image_commit, "video_commit": self.video_commit}
        callback.restore({**config.what, **commits}, total_items)
        return callback


if __name__ == "__main__":
    StableDiffFlow()
