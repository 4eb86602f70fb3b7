"""A digit classifier with the Hugging Face Trainer, as a Metaflow flow that survives any kill.

python mnist_huggingface/flow.py run
FAULTS=kill@step=100 python mnist_huggingface/flow.py run      # see it die and come back
"""

from metaflow import FlowSpec, Parameter, card, checkpoint, current, model, resources, retry, step

import common  # at the top on purpose: this is how Metaflow knows to package it for remote tasks

METRICS = ("eval_loss", "eval_accuracy")
STRATEGIES = ("best", "last", "all")


def what_to_keep(strategy: str, metric: str) -> dict:
    """What TrainingArguments calls load_best_model_at_end, save_total_limit=1 and neither, for the manager."""
    if strategy not in STRATEGIES or metric not in METRICS:
        raise ValueError(
            f"save-strategy is {strategy!r} and metric is {metric!r}: choose one of {', '.join(STRATEGIES)}, "
            f"and one of {', '.join(METRICS)}"
        )
    if strategy == "best":  # and the last two, to go on from; of a loss the lowest, as TrainingArguments has it
        return {"keep_best": (metric, "min" if metric.endswith("loss") else "max")}
    return {"keep_last": 1 if strategy == "last" else 1_000_000}


class MnistHuggingFaceFlow(FlowSpec):
    dataset = Parameter("dataset", default="digits", help="digits (offline) or mnist (downloaded)")
    revision = Parameter("revision", default="main", help="of the downloaded data set: a branch, a tag or a commit")
    epochs = Parameter("epochs", default=12, help="passes over the training data")
    batch_size = Parameter("batch-size", default=64, help="images in a step")
    learning_rate = Parameter("learning-rate", default=5e-3, help="peak of the cosine schedule")
    save_strategy = Parameter("save-strategy", default="best", help="what is kept: best, last or all")
    metric = Parameter("metric", default="eval_loss", help="what best means: eval_loss or eval_accuracy")
    save_every = Parameter("save-every", default="10", help="steps (20), time (10m) or both (500,10m)")
    push_to = Parameter("push-to", default="", help="a repository on the Hugging Face Hub; a new one is private")
    hub_strategy = Parameter("hub-strategy", default="every_save", help="when to push: end, every_save or checkpoint")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @step
    def start(self):
        from dataclasses import asdict

        from train import TrainConfig, resolve

        # bad parameters are refused here, before anything is written and without retries
        what_to_keep(self.save_strategy, self.metric)
        common.Publisher(self.push_to, strategy=self.hub_strategy)
        config = TrainConfig(
            dataset=self.dataset,
            revision=resolve(self.dataset, self.revision),  # to a commit, which every retry uses
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )
        self.config = asdict(config)
        self.next(self.train)

    @card(type="blank", id="training")  # how it went, and what it cost; refreshed while it trains
    @resources(cpu=2, memory=4000)
    @retry(times=4, minutes_between_retries=0)
    @model
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def train(self):
        from train import TrainConfig, train

        # pushes while it trains, in a process of its own; without --push-to it does nothing
        publisher = common.Publisher(self.push_to, current.checkpoint, strategy=self.hub_strategy)
        with (
            publisher,
            common.CheckpointManager(
                current.checkpoint,
                save_every=self.save_every,
                resume_from=self.resume_from,
                allow_changes=self.allow_changes,
                exact=self.exact,
                card=current.card["training"],
                **what_to_keep(self.save_strategy, self.metric),
            ) as checkpoints,
        ):
            result = train(TrainConfig(**self.config), checkpoints)
            publisher.model(result.path)

        self.history, self.weights_digest = result.history, result.weights_digest
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest  # a reference that Metaflow's own API loads, too
        self.classifier = current.model.save(str(result.path), label="mnist_huggingface")
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=4, minutes_between_retries=0)
    @model(load="classifier")  # by the artifact's name
    @step
    def evaluate(self):
        from metaflow.cards import Markdown
        from train import confusion_matrix, load_data

        data = load_data(self.config["dataset"], self.config["revision"])
        self.accuracy, counts = confusion_matrix(current.model.loaded["classifier"], data, dtype="float32")
        current.card.append(Markdown(f"# {self.accuracy:.2%} of the validation digits are right"))
        current.card.append(common.report.confusion_matrix(counts, list("0123456789")))
        print(f"validation accuracy {self.accuracy:.2%}")
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{self.history[-1]['step']} steps{resumed}; weights {self.weights_digest[:16]}")


if __name__ == "__main__":
    MnistHuggingFaceFlow()
