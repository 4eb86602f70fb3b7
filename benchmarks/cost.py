"""What checkpoints cost besides blocked time: the training's speed, CPU, bytes, disk, and what grows with their number.

python benchmarks/cost.py run
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from measure import Row, least, medians, model_and_adam, quiet, report, save_today, take_turns, tensors
from metaflow import FlowSpec, Parameter, checkpoint, current, delete_model, step

import common


def bytes_written():
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


def size_on_disk(directory):
    return sum(path.lstat().st_size for path in Path(directory).rglob("*") if path.is_file())


class CostBenchmark(FlowSpec):
    megabytes = Parameter("megabytes", default=50, help="of model and Adam state in the training loop")
    rounds = Parameter("rounds", default=7)
    saves = Parameter("saves", default=500)
    json = Parameter("json", default="", help="append the rows to this file")

    @checkpoint(load_policy="none", show_card=False)
    @step
    def start(self):
        import torch

        self.storage = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIRECTORY")))
        torch.set_num_threads(1)
        report(self.bytes_per_checkpoint(), self.json)
        report(self.growth(), self.json)
        for threads, goal in ((1, 1 / 5), (2, 1 / 2)):
            torch.set_num_threads(threads)
            report(self.loop(threads, goal), self.json)
        self.next(self.end)

    def loop(self, threads, goal):
        """A training loop that saves at an interval of 4 times today's blocking time."""
        import torch

        model, optimizer = model_and_adam(self.megabytes)
        state = common.TrainState(model=model, optimizer=optimizer)
        batch = torch.randn(4, 16, next(model.parameters()).shape[-1])

        def one_step():
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

        def seconds_of(action, count=5):
            spent = []
            for _ in range(count):
                began = time.perf_counter()
                action()
                spent.append(time.perf_counter() - began)
            return statistics.median(spent)

        kept = []
        blocked = seconds_of(lambda: kept.append(save_today(model, optimizer)))
        interval = max(1, round(4 * blocked / seconds_of(one_step)))
        for reference in kept:
            delete_model(reference)
        steps = 4 * interval  # of a block: four saves
        cpu = {"none": [], "common": [], "today": []}

        def block(name, save, finish=lambda: None):
            def run():
                before, began = time.process_time(), time.perf_counter()
                for number in range(1, steps + 1):
                    one_step()
                    if number % interval == 0:
                        save()
                spent = time.perf_counter() - began
                finish()
                cpu[name].append(time.process_time() - before)
                return spent

            return run

        with common.CheckpointManager(current.checkpoint, save_every="1h") as checkpoints:
            with quiet():
                checkpoints.restore(state)

            def ours():
                state.step += 1
                checkpoints.save(state)

            last = []

            def today_and_keep_two():
                last.append(save_today(model, optimizer))
                if len(last) > 2:
                    delete_model(last.pop(0))

            ways = {"none": block("none", lambda: None),
                    "common": block("common", ours, lambda: checkpoints.latest),
                    "today": block("today", today_and_keep_two)}  # fmt: skip
            seconds = take_turns(ways, self.rounds)
        # neighbours in time are compared, so that what else the machine does counts on both sides
        slowdowns = {name: [b / a - 1 for a, b in zip(seconds["none"], seconds[name], strict=True)]
                     for name in ("common", "today")}  # fmt: skip
        extras = {name: [b / a - 1 for a, b in zip(cpu["none"][1:], cpu[name][1:], strict=True)]
                  for name in ("common", "today")}  # fmt: skip
        slower = {name: statistics.median(values) for name, values in slowdowns.items()}
        extra = {name: statistics.median(values) for name, values in extras.items()}
        values = {**{f"{name} slowdown %": slower[name] * 100 for name in slower},
                  **{f"{name} extra CPU %": extra[name] * 100 for name in extra},
                  "interval ms": 1000 * interval * statistics.median(seconds["none"]) / steps}  # fmt: skip
        spare = "one spare core" if threads == 1 else "no spare core"
        what = f"slowdown of a loop that saves {self.megabytes} MB, {spare}"
        rows = [
            Row(what, "today's slowdown", slower["common"] / slower["today"], goal, values,
                least=least(slowdowns["common"], slowdowns["today"])),
            Row(f"extra CPU of that loop, {spare}", "today's", extra["common"] / extra["today"], 1.0, values,
                least=least(extras["common"], extras["today"])),
        ]  # fmt: skip
        if threads == 1:
            rows.insert(0, Row(what, "no checkpoints", slower["common"] * 100, 3.0, values, " %"))
        return rows

    def bytes_per_checkpoint(self):
        model, optimizer = model_and_adam(self.megabytes)
        state = common.TrainState(model=model, optimizer=optimizer)
        full = sum(tensor.nbytes for tensor in tensors(state.state_dict()))

        def of_one_save(state, where):
            with common.CheckpointManager(where, save_every="1h") as checkpoints, quiet():
                state.step += 1
                checkpoints.restore(state)
                written = []
                for _ in range(3):
                    before = bytes_written()
                    state.step += 1
                    checkpoints.save(state)
                    _ = checkpoints.latest
                    written.append(bytes_written() - before)
            return statistics.median(written)

        def today():
            before = bytes_written()
            reference = save_today(model, optimizer)
            spent = bytes_written() - before
            delete_model(reference)
            return spent

        mine, theirs = of_one_save(state, current.checkpoint), today()
        values = {"state MB": full / 1e6, "common MB": mine / 1e6, "today MB": theirs / 1e6}
        whole, adapter = lora()
        of_lora, of_whole = of_one_save(adapter, self.storage / "lora"), sum(tensor.nbytes for tensor in tensors(whole))
        return [
            Row(f"bytes written for a checkpoint of {full / 1e6:.3g} MB", "the state", mine / full, 1.05, values),
            Row("bytes written for a checkpoint of LoRA", "the full state", of_lora / of_whole, 0.01,
                {"full state MB": of_whole / 1e6, "common MB": of_lora / 1e6}),
        ]  # fmt: skip

    def growth(self):
        """Many saves of 1 MB, of which two are kept."""
        model, optimizer = model_and_adam(1)
        state = common.TrainState(model=model, optimizer=optimizer)
        one = sum(tensor.nbytes for tensor in tensors(state.state_dict()))
        blocked, stored, listing = [], [], {}
        with common.CheckpointManager(self.storage / "growth", save_every="1h", keep_last=2) as checkpoints:
            with quiet():
                checkpoints.restore(state)
            for number in range(1, self.saves + 1):
                state.step += 1
                began = time.perf_counter()
                checkpoints.save(state)
                blocked.append(time.perf_counter() - began)
                _ = checkpoints.latest
                stored.append(time.perf_counter() - began)
                if number in (10, self.saves):
                    turns = take_turns({"list": checkpoints._store.listing}, 15)
                    listing[number] = medians(turns)["list"]
        disk = size_on_disk(self.storage / "growth")
        early, late = slice(5, 25), slice(-20, None)
        values = {"save at 10, ms": statistics.median(blocked[early]) * 1000,
                  f"save at {self.saves}, ms": statistics.median(blocked[late]) * 1000,
                  "until stored at 10, ms": statistics.median(stored[early]) * 1000,
                  f"until stored at {self.saves}, ms": statistics.median(stored[late]) * 1000,
                  "listing at 10, ms": listing[10], f"listing at {self.saves}, ms": listing[self.saves],
                  "disk MB": disk / 1e6, "state MB": one / 1e6}  # fmt: skip
        ratio = statistics.median(blocked[late]) / statistics.median(blocked[early])
        allowed = 3 * one + 1024 * self.saves
        return [
            Row(f"save() after {self.saves} saves", "after 10", ratio, 1.1, values),
            Row(f"listing after {self.saves} saves", "after 10", listing[self.saves] / listing[10], 2.0, values),
            Row(f"disk after {self.saves} saves, 2 kept", "3 states and 1 KB a save", disk / allowed, 1.0, values),
        ]

    @step
    def end(self):
        pass


def lora():
    """What a full fine-tuning would save, and the state of LoRA of rank 8 on the same layers."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(4)))
    names = [name for name, _ in base.named_children()]
    whole = {"model": base.state_dict(), "moments": [base.state_dict(), base.state_dict()]}
    model = get_peft_model(base, LoraConfig(r=8, target_modules=names))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    model(torch.randn(4, 2048)).square().mean().backward()
    optimizer.step()

    class Adapter:
        def state_dict(self):
            return get_peft_model_state_dict(model)

        def load_state_dict(self, state):
            set_peft_model_state_dict(model, state)

    return whole, common.TrainState(model=Adapter(), optimizer=optimizer)


if __name__ == "__main__":
    CostBenchmark()
