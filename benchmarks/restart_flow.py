"""The flow that restart.py kills."""

import json
import os
import time
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, retry, step

import common


class RestartBenchmark(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint(load_policy="none", show_card=False)
    @step
    def start(self):
        import torch
        from measure import model_and_adam
        from restart import SAVE_EVERY, training

        torch.set_num_threads(1)
        model, optimizer = model_and_adam(float(os.environ["BENCHMARK_MEGABYTES"]))
        began = time.perf_counter()
        with common.CheckpointManager(current.checkpoint, save_every=SAVE_EVERY) as checkpoints:
            state = common.TrainState(model=model, optimizer=optimizer)
            checkpoints.restore(state)
            own = time.perf_counter() - began
            training(lambda: checkpoints.step(state), model, optimizer, lambda: state.step)
        Path(f"{os.environ['BENCHMARK_TIMES']}.own").write_text(json.dumps(own))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    RestartBenchmark()
