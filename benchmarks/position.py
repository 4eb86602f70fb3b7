"""What it costs to go on in the middle of an epoch: at 1% and at 99% of it, beside skipping batches.

python benchmarks/position.py --rounds 7
"""

import argparse
import time

from measure import Row, least, medians, report, take_turns

SAMPLES, BATCH = 100_000, 50


def compare(arguments):
    import torch
    from torch.utils.data import DataLoader, Dataset

    from common.sampler import ResumableSampler

    class Samples(Dataset):
        """Each sample costs a little, as reading and decoding does."""

        values = torch.randn(SAMPLES, 64)

        def __len__(self):
            return SAMPLES

        def __getitem__(self, index):
            return self.values[index].clone()

    torch.set_num_threads(1)
    data = Samples()
    batches = SAMPLES // BATCH

    def first_batch(at):
        sampler = ResumableSampler(SAMPLES, seed=0)
        sampler.set_epoch(3, start=at * BATCH)
        loader = iter(DataLoader(data, BATCH, sampler=sampler))
        began = time.perf_counter()
        next(loader)
        return time.perf_counter() - began

    def skipping(at):
        sampler = ResumableSampler(SAMPLES, seed=0)
        sampler.set_epoch(3)
        loader = iter(DataLoader(data, BATCH, sampler=sampler))
        began = time.perf_counter()
        for _ in range(at + 1):
            next(loader)
        return time.perf_counter() - began

    ways = {
        "common at 1%": lambda: first_batch(batches // 100),
        "common at 99%": lambda: first_batch(batches * 99 // 100),
        "skipping at 1%": lambda: skipping(batches // 100),
        "skipping at 99%": lambda: skipping(batches * 99 // 100),
    }
    seconds = take_turns(ways, arguments.rounds)
    values = medians(seconds)
    ratio = values["common at 99%"] / values["common at 1%"]
    spread = least(seconds["common at 99%"], seconds["common at 1%"])
    row = Row(f"first batch after a restart at 99% of {batches} batches", "at 1%", ratio, 1.1, values, least=spread)
    report([row], arguments.json)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", default="")
    compare(parser.parse_args())
