"""A flow that draws toy.py on a card."""

import toy
from metaflow import FlowSpec, card, checkpoint, current, retry, step

import common


class CardToyFlow(FlowSpec):
    @card(type="blank", id="training", refresh_interval=1)
    @retry(times=4, minutes_between_retries=0)
    @checkpoint(load_policy="none", show_card=False)
    @step
    def start(self):
        with common.CheckpointManager(
            current.checkpoint, save_every=2, keep_best=("loss", "min"), card=current.card["training"]
        ) as checkpoints:
            state = toy.train(checkpoints, steps=40)
        self.digest, self.history = toy.digest(state)
        self.resumed_from = checkpoints.resumed_from
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    CardToyFlow()
