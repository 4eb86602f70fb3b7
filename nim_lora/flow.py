"""A chat model fine-tuned with LoRA for NVIDIA NIM, as a Metaflow flow that survives any kill.

python nim_lora/flow.py run
FAULTS=kill@step=100 python nim_lora/flow.py run      # see it die and come back
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


class NimLoraFlow(FlowSpec):
    base_model = Parameter("base-model", default="local/tiny-llama-chat", help="a model of the Hub, or local/...")
    revision = Parameter("revision", default="main", help="of the model: a branch, a tag or a commit")
    dialogues = IncludeFile("dialogues", default=__file__.removesuffix("flow.py") + "dialogues.jsonl",
                            help="JSON Lines with messages; used without --dataset")  # fmt: skip
    dataset = Parameter("dataset", default="dialogues", help="a data set of the Hub, with messages")
    dataset_revision = Parameter("dataset-revision", default="main", help="of the data set: branch, tag or commit")
    epochs = Parameter("epochs", default=20, help="passes over the dialogues")
    batch_size = Parameter("batch-size", default=8, help="dialogues in a step")
    learning_rate = Parameter("learning-rate", default=1e-2, help="peak of the cosine schedule")
    lora_r = Parameter("lora-r", default=16, help="rank of the adapter")
    max_lora_rank = Parameter("max-lora-rank", default=32, help="limit of the server that it is for")
    max_length = Parameter("max-length", default=256, help="tokens of a dialogue; what is longer is cut")
    save_every = Parameter("save-every", default="10", help="steps (20), time (10m) or both (500,10m)")
    push_to = Parameter("push-to", default="", help="a repository on the Hugging Face Hub; a new one is private")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @huggingface_hub(cache_scope="flow")
    @step
    def start(self):
        from dataclasses import asdict

        from chat_template import training_template
        from export import check_rank
        from settings import MODEL_FILES, TOKENIZER_FILES, TrainConfig, load_dialogues, pinned
        from transformers import AutoTokenizer

        # bad parameters are refused here, before anything is written and without retries
        check_rank(self.lora_r, self.max_lora_rank)
        common.Publisher(self.push_to)
        names = ("base_model", "revision", "dataset", "dataset_revision", "epochs", "batch_size", "learning_rate",
                 "lora_r", "max_length")  # fmt: skip
        config = TrainConfig(**{name: getattr(self, name) for name in names}, lora_alpha=2 * self.lora_r)
        config = pinned(config)  # commits, which every retry uses
        self.config = asdict(config)
        self.rows = load_dialogues(config, self.dialogues)
        repo = {"repo_id": config.base_model, "revision": config.revision,
                "endpoint": common.hub.endpoint(config.base_model)}  # fmt: skip
        with common.hub.clear_errors(config.base_model, config.revision):
            with current.huggingface_hub.load(**repo, allow_patterns=TOKENIZER_FILES) as found:
                # whether it can be trained at all, before gigabytes are downloaded
                training_template(AutoTokenizer.from_pretrained(found), config.base_model)
            self.base = current.huggingface_hub.snapshot_download(**repo, allow_patterns=MODEL_FILES)
        self.next(self.train)

    @card(type="blank", id="training")  # how it went, and what it cost; refreshed while it trains
    @resources(cpu=2, memory=4000)
    @retry(times=4, minutes_between_retries=0)
    @model(load=["base"])
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def train(self):
        from pathlib import Path

        from settings import TrainConfig
        from train import train

        # pushes the adapter while it trains, in a process of its own; without --push-to it does nothing
        publisher = common.Publisher(self.push_to, current.checkpoint)
        with (
            publisher,
            common.CheckpointManager(
                current.checkpoint,
                save_every=self.save_every,
                keep_last=2,
                keep_best=("eval_loss", "min"),
                resume_from=self.resume_from,
                allow_changes=self.allow_changes,
                exact=self.exact,
                card=current.card["training"],
            ) as checkpoints,
        ):
            base = current.model.loaded["base"]  # it is only read
            common.hub.verify(base, self.config["revision"])
            result = train(TrainConfig(**self.config), checkpoints, Path(base), self.rows)
            publisher.model(result.adapter)

        self.history, self.weights_digest = result.history, result.weights_digest
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest  # a reference that Metaflow's own API loads, too
        self.adapter = current.model.save(str(result.adapter), label="nim_lora_adapter")
        self.fused = current.model.save(str(result.path), label="nim_lora_fused")
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=4, minutes_between_retries=0)
    @model(load=["base", "fused"])  # by the artifacts' names
    @step
    def evaluate(self):
        from metaflow.cards import Markdown, Table
        from train import answers

        questions = ["What is a checkpoint?", "How do I resume a failed run?", "Hello."]
        before, self.answers = (answers(current.model.loaded[name], questions) for name in ("base", "fused"))
        current.card.append(Markdown("# What it says, before and after"))
        rows = [list(map(repr, row)) for row in zip(questions, before, self.answers, strict=True)]
        current.card.append(Table(rows, headers=["question", "base model", "fine-tuned"]))
        for question, answer in zip(questions, self.answers, strict=True):
            print(f"{question} {answer!r}")
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{self.history[-1]['step']} steps{resumed}; weights {self.weights_digest[:16]}")


if __name__ == "__main__":
    NimLoraFlow()
