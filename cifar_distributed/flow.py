"""A residual network trained on several nodes, as a Metaflow flow whose gang dies and comes back.

python cifar_distributed/flow.py run --cluster-size 4
FAULTS=kill@step=200,rank=1 python cifar_distributed/flow.py run      # see one rank die, and all come back
"""

from metaflow import FlowSpec, Parameter, card, checkpoint, current, model, resources, retry, step, torchrun

import common.torchrun  # at the top on purpose: this is how Metaflow knows to package common for remote tasks

common.torchrun.mend()  # what metaflow-torchrun lacks on a laptop; does nothing on Kubernetes and Batch


class CifarDistributedFlow(FlowSpec):
    cluster_size = Parameter("cluster-size", default=2, help="nodes")
    ranks_per_node = Parameter("ranks-per-node", default=1, help="processes on each node: its number of GPUs")
    dataset = Parameter("dataset", default="digits", help="digits (offline) or cifar10 (downloaded)")
    network = Parameter("model", default="small", help="small, resnet18 or resnet50")
    epochs = Parameter("epochs", default=8, help="passes over the training data")
    batch_size = Parameter("batch-size", default=128, help="images in a step, of all ranks together")
    learning_rate = Parameter("learning-rate", default=6e-3, help="peak of the one-cycle schedule")
    dropout = Parameter("dropout", default=0.0, help="share of the last layer's inputs")
    width = Parameter("width", default=16, help="channels of the small network's first block")
    backgrounds = Parameter("backgrounds", default=4, help="photographs behind each training digit")
    timeout = Parameter("timeout", default=300, help="seconds to wait for a rank that is late or hangs")
    master_port = Parameter("master-port", default=0, help="where the ranks meet; 0: chosen")
    save_every = Parameter("save-every", default="20", help="steps (20), time (10m) or both (500,10m)")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other versions, devices or ranks")

    @step
    def start(self):
        from dataclasses import asdict

        from train import TrainConfig

        # bad parameters are refused here, before anything is written and without retries
        names = ("dataset", "epochs", "batch_size", "learning_rate", "dropout", "width", "backgrounds")
        config = TrainConfig(model=self.network, **{name: getattr(self, name) for name in names})
        config.check_ranks(self.cluster_size * self.ranks_per_node)
        self.config = asdict(config)
        self.next(self.train, num_parallel=self.cluster_size)

    @card(type="blank", id="training")  # how it went, and what it cost; refreshed while it trains
    @resources(cpu=2, memory=8000, shared_memory=2000)
    @retry(times=4, minutes_between_retries=0)
    @model
    @checkpoint(load_policy="none", show_card=False)  # the manager of rank 0 restores, and deletes what is not kept
    @torchrun
    @step
    def train(self):
        import json
        import tempfile
        from pathlib import Path

        with (
            tempfile.TemporaryDirectory() as output,
            common.report.follow(current.card["training"], f"{output}/card.jsonl"),  # draws what rank 0 writes there
            common.torchrun.node(),  # it dies with its gang, and says why
        ):
            keep = {
                "save_every": self.save_every,
                "keep_best": ["val_loss", "min"],
                "resume_from": common.torchrun.origin() or self.resume_from,
                "allow_changes": self.allow_changes,
                "exact": self.exact,
                "card": f"{output}/card.jsonl",
            }
            options = {"config": self.config, "timeout": self.timeout, "output": output, "checkpoints": keep}
            current.torch.run(
                entrypoint=str(Path(__file__).with_name("rank.py")),
                entrypoint_args=[json.dumps(options)],
                nproc_per_node=self.ranks_per_node,
                torchrun_args=common.torchrun.arguments(self.timeout, self.master_port),
            )
            answers = [json.loads(path.read_text()) for path in sorted(Path(output).glob("*.json"))]
            self.images_per_second = sum(answer["images_per_second"] for answer in answers)  # of this node
            if current.parallel.node_index == 0:
                first = answers[0]
                self.history, self.weights_digest = first["history"], first["weights_digest"]
                self.resumed_from, self.latest_checkpoint = first["resumed_from"], first["latest_checkpoint"]
                self.classifier = current.model.save(str(Path(output) / "model"), label="cifar_distributed")
        self.next(self.join)

    @retry(times=4, minutes_between_retries=0)
    @step
    def join(self, nodes):
        control, *_ = [node for node in nodes if hasattr(node, "classifier")]
        self.merge_artifacts([control], exclude=["images_per_second"])
        self.images_per_second = [node.images_per_second for node in nodes]
        self.next(self.test)

    @card(type="blank")
    @retry(times=4, minutes_between_retries=0)
    @model(load="classifier")  # by the artifact's name
    @step
    def test(self):
        from metaflow.cards import Markdown
        from train import TrainConfig, right_per_class

        right, total = right_per_class(current.model.loaded["classifier"], TrainConfig(**self.config))
        self.accuracies = [part / whole for part, whole in zip(right, total, strict=True)]
        self.accuracy = sum(right) / sum(total)
        current.card.append(Markdown(f"# {self.accuracy:.2%} of the test images are right"))
        current.card.append(
            common.report.bars({str(n): a for n, a in enumerate(self.accuracies)}, "accuracy per class")
        )
        lines = {"loss": "training, mean of all ranks", "val_loss": "validation"}
        current.card.append(common.report.curves(self.history, lines, "loss"))
        print("test accuracy " + "  ".join(f"{label}: {value:.0%}" for label, value in enumerate(self.accuracies)))
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        speeds = " + ".join(f"{speed:.0f}" for speed in self.images_per_second)
        print(f"test accuracy {self.accuracy:.2%}; {speeds} images/s")
        print(f"{self.history[-1]['step']} steps{resumed}; weights {self.weights_digest[:16]}")


if __name__ == "__main__":
    CifarDistributedFlow()
