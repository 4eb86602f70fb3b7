"""A flow that refreshes one card in every way, and says what each has written and how many processes it took."""

import json
import os
from glob import glob
from importlib import import_module
from pathlib import Path

from metaflow import FlowSpec, card, current, step

from common import metaflow_card


class CardRefreshFlow(FlowSpec):
    @card(type="blank", id="training", refresh_interval=1000)
    @step
    def start(self):
        from metaflow.cards import Markdown

        card, line = current.card["training"], Markdown("a")
        card.append(line)
        manager = import_module("metaflow.plugins.cards.card_creator").CardProcessManager
        started, found, register = [], {}, manager._register_card_process
        manager._register_card_process = lambda uuid, process: (started.append(process), register(uuid, process))

        def note(name):
            root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
            pattern = f"**/{current.run_id}/**/runtime/*.data.json"
            shown = [root / name for name in glob(pattern, root_dir=root, recursive=True, include_hidden=True)]
            content = json.loads(shown[0].read_text()) if shown else None
            found[name] = {"content": content, "files": [path.name for path in shown], "processes": len(started)}

        metaflow_card.refresh_in_place(card)
        card.refresh()  # the first one: the page itself
        found["nice"] = os.getpriority(os.PRIO_PROCESS, started[0].pid)
        started[0].wait()
        note("page")
        line.update("b")
        card.refresh()  # within refresh_interval: not at all
        note("too early")
        metaflow_card.refresh_now(card)
        note("in place")
        type(card)._card_proc(card, "refresh")
        started[-1].wait()
        note("by Metaflow")

        line.update("c")
        store = import_module("metaflow.plugins.cards.card_datastore").CardDatastore
        shipped, store.save_data = store.save_data, None  # as in a Metaflow that has changed inside
        metaflow_card.refresh_now(card)
        store.save_data = shipped
        started[-1].wait()
        note("changed inside")
        card.append(Markdown("d"))  # another part: the page is rendered anew
        metaflow_card.refresh_now(card)
        note("another part")
        (Path.cwd() / "found.json").write_text(json.dumps(found))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    CardRefreshFlow()
