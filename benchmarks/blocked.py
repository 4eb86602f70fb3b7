"""How long the training thread is blocked by a save, and how long a restore takes, beside the field's other ways.

python benchmarks/blocked.py run --sizes 1,50,500 --rounds 7
"""

import copy
import os
import shutil
import tempfile
import time
from pathlib import Path

from measure import Memcpy, Row, medians, model_and_adam, quiet, report, save_today, state_dicts, take_turns, versus
from metaflow import FlowSpec, Parameter, checkpoint, current, delete_model, step

import common


class BlockedBenchmark(FlowSpec):
    sizes = Parameter("sizes", default="1,50,500", help="megabytes of model and Adam state")
    rounds = Parameter("rounds", default=7)
    json = Parameter("json", default="", help="append the rows to this file")

    @checkpoint(load_policy="none", show_card=False)
    @step
    def start(self):
        import torch

        torch.set_num_threads(1)  # as on a busy machine; and torch's copy_ on two threads takes 7 times as long
        with common.CheckpointManager(current.checkpoint, save_every="1h") as checkpoints:
            checkpoints.restore(common.TrainState())
            for size in self.sizes.split(","):
                report(self.save(float(size), checkpoints), self.json)
        for size in map(float, self.sizes.split(",")):
            if size > 10:  # less takes milliseconds, and has no goal
                report(self.restore(size), self.json)
        self.next(self.end)

    def save(self, megabytes, checkpoints):
        import torch
        import torch.distributed.checkpoint as dcp
        from lightning.fabric.plugins.io import TorchCheckpointIO
        from lightning.pytorch.plugins.io import AsyncCheckpointIO

        model, optimizer = model_and_adam(megabytes)
        tree = state_dicts(model, optimizer)
        state = common.TrainState(model=model, optimizer=optimizer)
        folder = Path(tempfile.mkdtemp())
        lightning = AsyncCheckpointIO(TorchCheckpointIO())

        def ours():
            state.step += 1
            began = time.perf_counter()
            checkpoints.save(state)
            spent = time.perf_counter() - began
            _ = checkpoints.latest  # until it is stored
            return spent

        def today():
            began = time.perf_counter()
            reference = save_today(model, optimizer)
            spent = time.perf_counter() - began
            delete_model(reference)
            return spent

        def dcp_async():
            target = folder / "dcp"
            began = time.perf_counter()
            future = dcp.async_save(state_dicts(model, optimizer), checkpoint_id=str(target))
            spent = time.perf_counter() - began
            future.result()
            shutil.rmtree(target)
            return spent

        def lightning_async():
            target = folder / "lightning.ckpt"
            began = time.perf_counter()
            lightning.save_checkpoint(state_dicts(model, optimizer), str(target))
            spent = time.perf_counter() - began
            lightning.teardown()
            lightning._executor = None
            target.unlink()
            return spent

        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        floor = Memcpy(tree)
        ways = {"memcpy": floor, "common": ours, "torch.save + save()": today, "DCP async_save": dcp_async,
                "Lightning AsyncCheckpointIO": lightning_async}  # fmt: skip
        seconds = take_turns(ways, self.rounds, warm_up=2)
        shutil.rmtree(folder)
        what = f"blocked by a save, {floor.nbytes / 1e6:.3g} MB"
        goals = {"memcpy": 1.3, "torch.save + save()": 1 / 8, "DCP async_save": 1 / 2,
                 "Lightning AsyncCheckpointIO": 1 / 3}  # fmt: skip
        if megabytes < 10:
            blocked = medians(seconds)
            return [Row(what, "1 ms", blocked["common"], 1.0, blocked, " ms")]
        return versus(what, seconds, "common", goals)

    def restore(self, megabytes):
        import torch
        import torch.distributed.checkpoint as dcp

        model, optimizer = model_and_adam(megabytes)
        tree = copy.deepcopy(state_dicts(model, optimizer))
        state = common.TrainState(model=model, optimizer=optimizer)
        folder = Path(tempfile.mkdtemp())
        torch.save(tree, folder / "state.pt")
        dcp.save(tree, checkpoint_id=str(folder / "dcp"))

        def load(mmap):
            saved = torch.load(folder / "state.pt", weights_only=True, mmap=mmap)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if mmap:  # nothing of Adam's moments has been read until they are touched
                for moments in optimizer.state.values():
                    for name, value in moments.items():
                        moments[name] = value.clone()

        def load_dcp():
            target = state_dicts(model, optimizer)
            dcp.load(target, checkpoint_id=str(folder / "dcp"))
            optimizer.load_state_dict(target["optimizer"])

        with common.CheckpointManager(folder / "ours", save_every="1h") as checkpoints, quiet():
            checkpoints.restore(state)
            state.step = 1
            checkpoints.save(state)
            _ = checkpoints.latest
            ways = {"memcpy": Memcpy(tree), "common": lambda: checkpoints.restore(state),
                    "torch.load + copy": lambda: load(mmap=False), "torch.load(mmap) + copy": lambda: load(mmap=True),
                    "DCP load": load_dcp}  # fmt: skip
            seconds = take_turns(ways, self.rounds, warm_up=2)
        shutil.rmtree(folder)
        goals = {"memcpy": 1.5 if megabytes > 100 else 2.5, "torch.load + copy": 0.5}
        return versus(f"restore into a live model, {megabytes:.3g} MB", seconds, "common", goals)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    BlockedBenchmark()
