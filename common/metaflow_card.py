"""What it takes to refresh a card all the time: the private parts of Metaflow's cards, in one place.

For each refresh Metaflow starts a process that imports Metaflow and the whole flow, to write down a few kilobytes. On
busy cores it may not get that far before its time is up. Here the calling thread writes them. Where that fails,
Metaflow's own way is taken.
"""

import contextlib
import os
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any


def refresh_in_place(card: Any) -> None:
    """Let ``card.refresh()`` write what changed on the calling thread. Its interval and its first rendering stay.

    Args:
        card: ``current.card[id]``, of a kind that can be refreshed.
    """
    with contextlib.suppress(AttributeError):
        shipped: Callable[..., None] = card._card_proc

        def card_proc(mode: str, sync: bool = False) -> None:
            if mode != "refresh" or not _written(card):
                shipped(mode, sync=sync)
                _each_renderer(lambda process: os.setpriority(os.PRIO_PROCESS, process.pid, 10))

        card._card_proc = card_proc


def refresh_now(card: Any) -> None:
    """Refresh, however short ago the last time was."""
    card._last_refresh = 0
    card.refresh()


def leave_out(card: Any) -> None:
    """Make no card of it when the task is done, where Metaflow makes one of an empty card, too."""
    with contextlib.suppress(AttributeError):
        creator, mine = card._card_creator, card._card_creator_args["card_uuid"]
        create = creator.create

        def create_another(**options: Any) -> None:
            if options["card_uuid"] != mine:
                create(**options)

        creator.create = create_another


def hash_of(card: Any) -> str:
    """What ``card get`` and ``card view`` take as ``--hash``, to tell the attempts' cards of one id apart; or ""."""
    with contextlib.suppress(AttributeError, KeyError):
        return card._card_creator_args["card_uuid"][:5]
    return ""


def end_renderers() -> None:
    """End the process that renders. When the task is done Metaflow renders once more, and would wait for it."""
    _each_renderer(lambda process: process.kill())


def _each_renderer(do: Callable[[Any], object]) -> None:
    with contextlib.suppress(Exception):
        manager: Any = import_module("metaflow.plugins.cards.card_creator").CardProcessManager
        for running in manager.async_card_processes.values():
            if running["proc"].poll() is None:
                do(running["proc"])


def _written(card: Any) -> bool:
    """Do what ``card create --mode refresh`` does; False when it cannot be done here."""
    with contextlib.suppress(Exception):
        plugins, cli = import_module("metaflow.plugins"), import_module("metaflow.plugins.cards.card_cli")
        current: Any = import_module("metaflow").current
        chosen = card._card_creator_args
        kind = chosen["decorator_attributes"]["type"]
        drawn = next(known for known in plugins.CARDS if known.type == kind)(components=[])
        data = card._get_latest_data(mode="refresh")
        shown = cli.update_card(drawn, "refresh", SimpleNamespace(finished=False), data).data
        if shown is not None:
            _store(card, current).save_data(chosen["card_uuid"], kind, shown, card_id=chosen["user_set_card_id"])
            return True
    return False


def _store(card: Any, current: Any) -> Any:
    """Where the cards of this task are."""
    datastore: Any = import_module("metaflow.plugins.cards.card_datastore").CardDatastore
    given = card._card_creator._top_level_options
    options: dict[str, str] = dict(pairwise(given))  # names and their values, and other pairs, which nobody asks for
    implementations: Any = import_module("metaflow.plugins").DATASTORES
    kind = {known.TYPE: known for known in implementations}[options["--datastore"]]
    root = datastore.get_storage_root(kind.TYPE) or options["--datastore-root"]
    flow = SimpleNamespace(_storage_impl=kind(root), flow_name=current.flow_name)
    return datastore(flow, pathspec=current.pathspec)
