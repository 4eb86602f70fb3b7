"""A flow whose tasks do not get on at the same pace; each of its runs fails until all are done."""

from pathlib import Path

import toy
from metaflow import FlowSpec, Parameter, checkpoint, current, step

import common


class UnevenFlow(FlowSpec):
    case = Parameter("case", required=True)

    @step
    def start(self):
        self.indices = list(range(2 if self.case == "steps" else 5))
        self.next(self.train, foreach="indices")

    @checkpoint(load_policy="none", show_card=False)
    @step
    def train(self):
        getattr(self, self.case)()
        self.next(self.join)

    def steps(self):
        """The first task is far ahead and done; each run takes the second one step further."""
        with common.CheckpointManager(current.checkpoint, save_every=1) as checkpoints:
            state = toy.new_state()
            checkpoints.restore(state, toy.CONFIG)
            target = 50 if self.input == 0 else state.step + 1
            while state.step < target:
                checkpoints.step(state)
        if state.step < 5:
            raise RuntimeError(f"only {state.step} steps")

    def tasks(self):
        """No checkpoints; each run finishes one task more."""
        Path(f"run-{current.run_id}").touch()
        if self.input >= len(list(Path.cwd().glob("run-*"))):
            raise RuntimeError("not yet")

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    UnevenFlow()
