"""A digit classifier in Keras, as a Metaflow flow that survives any kill.

python mnist_keras/flow.py run
FAULTS=kill@step=100 python mnist_keras/flow.py run      # see it die and come back
"""

from metaflow import FlowSpec, Parameter, card, checkpoint, current, model, resources, retry, step

import common  # at the top on purpose: this is how Metaflow knows to package it for remote tasks


class MnistKerasFlow(FlowSpec):
    dataset = Parameter("dataset", default="digits", help="digits (offline) or mnist (downloaded)")
    epochs = Parameter("epochs", default=12, help="passes over the training data")
    batch_size = Parameter("batch-size", default=64, help="images in a step")
    learning_rate = Parameter("learning-rate", default=3e-3, help="start of the cosine schedule")
    save_every = Parameter("save-every", default="10", help="steps (20), time (10m) or both (500,10m)")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @step
    def start(self):
        from dataclasses import asdict

        from train import TrainConfig

        # bad parameters are refused here, before anything is written and without retries
        self.config = asdict(
            TrainConfig(
                dataset=self.dataset,
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            )
        )
        self.next(self.train)

    @card(type="blank", id="training")  # how it went, and what it cost; refreshed while it trains
    @resources(cpu=2, memory=4000)
    @retry(times=4, minutes_between_retries=0)
    @model
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def train(self):
        from train import TrainConfig, train

        with common.CheckpointManager(
            current.checkpoint,
            save_every=self.save_every,
            keep_last=2,
            keep_best=("val_loss", "min"),
            resume_from=self.resume_from,
            allow_changes=self.allow_changes,
            exact=self.exact,
            card=current.card["training"],
        ) as checkpoints:
            result = train(TrainConfig(**self.config), checkpoints)

        self.history, self.weights_digest = result.history, result.weights_digest
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest  # a reference that Metaflow's own API loads, too
        self.classifier = current.model.save(str(result.path), label="mnist_keras")
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=4, minutes_between_retries=0)
    @model(load="classifier")  # by the artifact's name
    @step
    def evaluate(self):
        from metaflow.cards import Markdown
        from train import confusion_matrix

        self.accuracy, counts = confusion_matrix(current.model.loaded["classifier"], self.config["dataset"])
        current.card.append(Markdown(f"# {self.accuracy:.2%} of the validation digits are right"))
        current.card.append(common.report.confusion_matrix(counts, list("0123456789")))
        print(f"validation accuracy {self.accuracy:.2%}")
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{self.history[-1]['step']} steps{resumed}; weights {self.weights_digest[:16]}")


if __name__ == "__main__":
    MnistKerasFlow()
