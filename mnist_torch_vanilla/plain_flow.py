"""The same training with nothing but @checkpoint and current.checkpoint.save(). The README lists what it survives.

python mnist_torch_vanilla/plain_flow.py run
"""

from metaflow import FlowSpec, Parameter, checkpoint, current, model, retry, step

import common  # noqa: F401  # train.py takes its sampler from there


class PlainMnistFlow(FlowSpec):
    epochs = Parameter("epochs", default=12, help="passes over the training data")
    batch_size = Parameter("batch-size", default=64, help="images in a step")

    @step
    def start(self):
        self.next(self.train)

    @retry(times=4, minutes_between_retries=0)
    @model
    @checkpoint
    @step
    def train(self):
        from pathlib import Path

        import torch
        from safetensors.torch import save_file
        from torch.nn.functional import cross_entropy
        from torch.utils.data import DataLoader
        from train import AugmentedDigits, TrainConfig, build_model, evaluate, load_data

        config = TrainConfig(epochs=self.epochs, batch_size=self.batch_size)
        torch.manual_seed(config.seed)
        data = load_data(config.dataset)
        dataset = AugmentedDigits(data.train_images, data.train_labels, config.seed)
        sampler = common.ResumableSampler(len(dataset), config.seed)
        loader = DataLoader(dataset, config.batch_size, sampler=sampler, generator=torch.Generator())
        net = build_model(config.dropout)
        optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.epochs * len(loader))

        first_epoch, self.history = 0, []
        path = Path(current.checkpoint.directory) / "state.pt"
        if current.checkpoint.is_loaded:  # a retry of this task; never in a new or a resumed run
            state = torch.load(path, weights_only=True)
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"])
            first_epoch, self.history = state["epoch"], state["history"]

        print(f"starts at epoch {first_epoch}", flush=True)
        for epoch in range(first_epoch, config.epochs):
            dataset.epoch = epoch
            sampler.set_epoch(epoch)
            net.train()
            for images, labels in loader:
                loss = cross_entropy(net(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
            self.history.append({"epoch": epoch + 1, **evaluate(net, data.val_images, data.val_labels)})
            state = {
                "model": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "epoch": epoch + 1,
                "history": self.history,
            }
            torch.save(state, path)
            current.checkpoint.save(metadata={"epoch": epoch + 1})
            print(f"finished epoch {epoch + 1}", flush=True)

        self.weights_digest = common.weights_digest(net.state_dict())
        save_file(net.state_dict(), Path(current.checkpoint.directory) / "model.safetensors")
        self.classifier = current.model.save(str(path.parent / "model.safetensors"), label="mnist_plain")
        self.next(self.end)

    @step
    def end(self):
        print(f"validation accuracy {self.history[-1]['val_accuracy']:.2%}")


if __name__ == "__main__":
    PlainMnistFlow()
