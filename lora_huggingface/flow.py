"""A language model fine-tuned with LoRA, as a Metaflow flow that survives any kill.

python lora_huggingface/flow.py run
FAULTS=kill@step=50 python lora_huggingface/flow.py run      # see it die and come back
"""

from metaflow import (
    Config,
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
)  # fmt: skip
from metaflow.exception import MetaflowException

import common  # at the top on purpose: this is how Metaflow knows to package it for remote tasks


def parse(text: str) -> dict:
    from settings import parse

    try:
        return parse(text)
    except ValueError as error:
        raise MetaflowException(str(error)) from None  # without a traceback


class LoraHuggingFaceFlow(FlowSpec):
    settings = Config("settings", default=__file__.removesuffix("flow.py") + "config.yaml", parser=parse,
                      help="a YAML file; its knobs and their defaults are in config.yaml")  # fmt: skip
    instructions = IncludeFile("instructions", default=__file__.removesuffix("flow.py") + "instructions.jsonl",
                               help="JSON Lines with instruction, input, output; used without --dataset")  # fmt: skip
    # the ones you change most; all have their default from the file
    base_model = Parameter("base-model", type=str, default=settings.base_model, help="a model of the Hub, or local/...")
    revision = Parameter("revision", type=str, default=settings.revision, help="of the model: branch, tag or commit")
    dataset = Parameter("dataset", type=str, default=settings.dataset, help="a data set of the Hub")
    dataset_revision = Parameter("dataset-revision", type=str, default=settings.dataset_revision,
                                 help="of the data set: branch, tag or commit")  # fmt: skip
    epochs = Parameter("epochs", type=int, default=settings.epochs, help="passes over the training data")
    batch_size = Parameter("batch-size", type=int, default=settings.batch_size, help="rows in a step")
    learning_rate = Parameter("learning-rate", type=float, default=settings.learning_rate, help="peak of the schedule")
    merge_adapter = Parameter("merge", type=bool, default=settings.merge, help="also save the merged model")
    save_every = Parameter("save-every", type=str, default=settings.save_every,
                           help="steps (20), time (10m) or both (500,10m)")  # fmt: skip
    push_to = Parameter("push-to", default="", help="a repository on the Hugging Face Hub; a new one is private")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @huggingface_hub(cache_scope="flow")  # with this scope the commit is part of the cache's key
    @step
    def start(self):
        from dataclasses import asdict

        from instructions import json_files, read_rows
        from settings import DATA_FILES, MODEL_FILES, OWN_DATA, TrainConfig, check_targets, pinned

        # bad parameters are refused here, without retries
        common.Publisher(self.push_to)
        names = ("base_model", "revision", "dataset", "dataset_revision", "epochs", "batch_size", "learning_rate")
        config = TrainConfig(**{**self.settings, **{name: getattr(self, name) for name in names}})
        config = pinned(config)  # commits, which every retry uses
        self.config = asdict(config)
        hub = current.huggingface_hub
        with common.hub.clear_errors(config.base_model, config.revision):
            with hub.load(
                repo_id=config.base_model, revision=config.revision, allow_patterns=["config.json"],
                endpoint=common.hub.endpoint(config.base_model),
            ) as found:  # fmt: skip
                check_targets(config, found)  # before gigabytes come
            self.base = hub.snapshot_download(
                repo_id=config.base_model, revision=config.revision, allow_patterns=MODEL_FILES,
                endpoint=common.hub.endpoint(config.base_model),
            )  # fmt: skip
        files = {"instructions": self.instructions}
        if config.dataset != OWN_DATA:
            with common.hub.clear_errors(config.dataset, config.dataset_revision, repo_type="dataset"), hub.load(
                repo_id=config.dataset, revision=config.dataset_revision, repo_type="dataset",
                allow_patterns=DATA_FILES, endpoint=common.hub.endpoint(config.dataset),
            ) as found:  # fmt: skip
                files = json_files(common.hub.private_copy(found, config.dataset_revision))
        self.rows = read_rows(files)
        print(f"{config.base_model} at {config.revision[:12]}, {len(self.rows)} rows of {config.dataset}")
        self.next(self.prepare)

    @retry(times=4, minutes_between_retries=0)
    @model(load="base")
    @checkpoint(load_policy="none", show_card=False)
    @step
    def prepare(self):
        from instructions import fingerprint_of, prepare
        from settings import TrainConfig

        config = TrainConfig(**self.config)
        common.hub.verify(current.model.loaded["base"], config.revision)
        with common.CheckpointManager(current.checkpoint) as checkpoints:  # one for each shard, all are kept
            self.data = prepare(config, self.rows, current.model.loaded["base"], checkpoints)
        self.lineage = {
            "base_model": config.base_model, "base_commit": config.revision,
            "dataset": config.dataset, "dataset_commit": config.dataset_revision,
            "data_fingerprint": fingerprint_of(self.data),
        }  # fmt: skip
        self.next(self.train)

    @card(type="blank", id="training")  # how it went, and what it cost; refreshed while it trains
    @resources(cpu=2, memory=8000)  # for a real model: add gpu=1
    @retry(times=4, minutes_between_retries=0)
    @model(load="base")
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def train(self):
        from train import TrainConfig, finetune, merge

        config = TrainConfig(**self.config)
        common.hub.verify(current.model.loaded["base"], config.revision)
        # pushes the adapter while it trains, in a process of its own; without --push-to it does nothing
        publisher = common.Publisher(self.push_to, current.checkpoint)
        with (
            publisher,
            common.CheckpointManager(
                current.checkpoint,
                save_every=self.save_every,
                keep_best=("eval_loss", "min"),
                resume_from=self.resume_from,
                allow_changes=self.allow_changes,
                exact=self.exact,
                card=current.card["training"],
            ) as checkpoints,
        ):
            result = finetune(config, current.model.loaded["base"], self.data, checkpoints)
            publisher.model(result.path)

        self.history, self.weights_digest = result.history, result.weights_digest
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest  # a reference that Metaflow's own API loads, too
        self.lineage = {**self.lineage, "adapter_digest": result.weights_digest}
        self.adapter = current.model.save(str(result.path), label="lora_adapter", metadata=self.lineage)
        if self.merge_adapter:
            merged = merge(config, current.model.loaded["base"], result.path, checkpoints.directory / "merged")
            self.merged = current.model.save(str(merged), label="lora_merged", metadata=self.lineage)
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=4, minutes_between_retries=0)
    @model(load=["base", "adapter"])  # by the artifacts' names
    @step
    def evaluate(self):
        from metaflow.cards import Markdown, Table
        from train import TrainConfig, evaluate

        loaded = current.model.loaded
        merged = current.model.load(self.merged) if self.merge_adapter else None
        config = TrainConfig(**self.config)
        found = evaluate(config, loaded["base"], loaded["adapter"], self.rows, self.data, merged)
        self.perplexity_before, self.perplexity_after = found["before"], found["after"]
        self.samples = found["samples"]
        text = f"perplexity of the validation answers: {self.perplexity_before:.1f} -> {self.perplexity_after:.1f}"
        print(text)
        base = f"{self.config['base_model']} at {self.config['revision']}"
        current.card.append(Markdown(f"# {text}\n\n{base}, before and after {self.history[-1]['step']} steps"))
        headers = ["instruction", "input", "output", "before", "after"]
        current.card.append(Table([[row[name] for name in headers] for row in self.samples], headers=headers))
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{self.history[-1]['step']} steps{resumed}; weights {self.weights_digest[:16]}")


if __name__ == "__main__":
    LoraHuggingFaceFlow()
