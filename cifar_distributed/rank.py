"""What torchrun starts for flow.py, once for each rank: train.py with the checkpoints of the control task."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from train import TrainConfig, join_gang, train

from common.distributed import DistributedCheckpointManager


def main(config: dict, timeout: float, output: str, checkpoints: dict) -> None:
    join_gang(timeout)
    place = None
    if dist.get_rank() == 0:  # it saves, and finds what the control task's earlier attempts have saved
        import metaflow

        place = metaflow.Checkpoint()
    with DistributedCheckpointManager(place, timeout=timeout, **checkpoints) as manager:
        result = train(TrainConfig(**config), manager)
        answer = {"images_per_second": result.images_per_second}
        if result.path is not None:
            shutil.copytree(result.path, Path(output) / "model")
            answer |= {"history": result.history, "weights_digest": result.weights_digest,
                       "resumed_from": manager.resumed_from, "latest_checkpoint": manager.latest}  # fmt: skip
    (Path(output) / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
