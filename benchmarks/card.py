"""What the card costs a training that it is drawn for, at one refresh a second.

python benchmarks/card.py run --seconds 240

One training in a Metaflow task, in blocks of four seconds: in every other block its card is drawn and refreshed once a
second, as in any example. Neighbouring blocks are compared, so that what else the machine does counts on both sides.
Four figures: wall time of a step; its CPU time, in which a busy machine shows less; the share of the time in which
the card's thread runs, which is what it can take from the training thread at most; and what a refresh costs there,
beside the process that Metaflow would start for it.
"""

import resource
import statistics
import tempfile
import threading
import time

from metaflow import FlowSpec, Parameter, card, current, step

import common
import common.metaflow_card

BLOCK, SETTLE = 4.0, 2.0  # seconds


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class CardBenchmark(FlowSpec):
    seconds = Parameter("seconds", default=240, help="how long to train")

    @card(type="blank", id="training", refresh_interval=1)
    @step
    def start(self):
        import numpy as np

        drawn, used, draws = threading.Event(), [0.0], [0]
        draw = common.report.TrainingCard._draw

        def draw_in_every_other_block(self):
            if drawn.is_set() and threading.current_thread() is not threading.main_thread():
                began = time.thread_time()
                draw(self)
                used[0] += time.thread_time() - began
                draws[0] += 1

        common.report.TrainingCard._draw = draw_in_every_other_block
        matrix = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
        blocks = []
        with common.CheckpointManager(
            tempfile.mkdtemp(), save_every="1h", card=current.card["training"]
        ) as checkpoints:
            state = common.TrainState()
            checkpoints.restore(state, total_steps=10**6)
            while len(blocks) < max(4, self.seconds // (BLOCK + SETTLE)):
                on = len(blocks) % 4 in (0, 3)  # with, without, without, with, ...
                (drawn.set if on else drawn.clear)()
                time.sleep(SETTLE)  # until the process that renders is gone, or has begun
                steps, began, cpu = 0, time.perf_counter(), time.thread_time()
                while (spent := time.perf_counter() - began) < BLOCK:
                    value = float(np.tanh(matrix @ matrix).mean())
                    checkpoints.step(state, {"loss": value, "more": 1.0})
                    steps += 1
                blocks.append((on, spent / steps, (time.thread_time() - cpu) / steps))
        for place, name in ((1, "wall"), (2, "CPU")):
            ratios = []
            for one, two in zip(blocks[::2], blocks[1::2], strict=False):
                with_card, without = (one, two) if one[0] else (two, one)
                ratios.append(with_card[place] / without[place] - 1)
            middle = statistics.quantiles(ratios, n=4)
            print(f"{name} time of a step with the card: {middle[1]:+.2%} "
                  f"(quartiles {middle[0]:+.2%} to {middle[2]:+.2%}, {len(ratios)} pairs)")  # fmt: skip
        share = used[0] / (sum(block[0] for block in blocks) * (BLOCK + SETTLE))
        print(f"the card's thread runs {share:.2%} of the time; {draws[0]} refreshes, {state.step} steps")
        here, theirs = [], []
        for _ in range(7):
            began = time.thread_time()
            common.metaflow_card.refresh_now(current.card["training"])
            here.append(time.thread_time() - began)
            began = cpu_of_children()
            type(current.card["training"])._card_proc(current.card["training"], "refresh", sync=True)
            theirs.append(cpu_of_children() - began)
        print(f"a refresh takes {statistics.median(here) * 1000:.2g} ms of a core on that thread, "
              f"{statistics.median(theirs) * 1000:.0f} ms in the process that Metaflow starts for it")  # fmt: skip
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    CardBenchmark()
