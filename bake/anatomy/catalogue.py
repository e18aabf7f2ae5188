"""Every architecture of the installed transformers: which sites are exact, by which route, why not else.

Each is examined on its default configuration, in one of a few processes, with a limit on the processor
time that it takes, which a busy machine does not change: 190 constructors written by as many hands include
some that never come back.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from bake.anatomy.examination import examine
from bake.anatomy.routes import SiteRoute
from bake.anatomy.tables import COMPLETIONS
from bake.checkpoint.loading import quiet_transformers
from bake.errors import BakeError, UnsupportedError
from bake.sites import SITES
from bake.writes import SCOPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bake.anatomy.choice import Anatomy

PROCESSES, TIME_LIMIT = 2, 60.0
ABLATION = "ablation"  # where a site would stand; its routes are the scopes
# Times the limit, by the clock: for a process that waits for something and never comes back.
PATIENCE = 20


@dataclass(frozen=True)
class CatalogueRoute:
    """One exact route of an architecture. slots: names inside a layer, or what the base is rewritten to.

    layers: how many can be pushed, as "40 of 48".
    """

    route: str
    kind: str
    slots: tuple[str, ...]
    flags: tuple[str, ...]
    layers: str
    greedy_equal: bool


@dataclass(frozen=True)
class CatalogueEntry:
    """One site of one architecture, or its ablation: the exact routes, or the reason why it has none."""

    model_type: str
    site: str
    routes: tuple[CatalogueRoute, ...]
    refusal: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)


def list_model_types() -> list[str]:
    """Return the model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(model_type: str) -> PreTrainedConfig:
    """Return a model type's default configuration, completed where it alone builds no decoder.

    Raises UnsupportedError where the defaults contradict themselves.
    """
    from transformers import CONFIG_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
        options = dict(COMPLETIONS.get(model_type, {}))
        for name, nested in config_class.sub_configs.items():
            completion = COMPLETIONS.get(getattr(nested, "model_type", ""))
            if completion and name not in options:
                options[name] = completion
        config: PreTrainedConfig = config_class(**options)
    except Exception as error:  # Whatever a third-party constructor raises, it builds no config.
        raise UnsupportedError(
            f"{model_type}: its default configuration is invalid ({' '.join(str(error).split())[:160]})"
        ) from error
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def examine_model_type(model_type: str) -> list[CatalogueEntry]:
    """Return what is exact in one architecture, site by site, on its default configuration."""
    try:
        with quiet_transformers():
            anatomy = examine(default_config(model_type))
    except BakeError as error:
        return _refuse(model_type, str(error))
    entries = [
        CatalogueEntry(
            model_type,
            site,
            tuple(
                _summarise(route, anatomy.layer_count)
                for route in anatomy.routes
                if route.site == site
            ),
            anatomy.refusals.get(site),
        )
        for site in SITES
    ]
    return [*entries, _judge_ablation(model_type, anatomy)]


def _judge_ablation(model_type: str, anatomy: Anatomy) -> CatalogueEntry:
    """Return which scopes an architecture can be ablated in, as routes, or why in none."""
    found = anatomy.ablation
    exact = [scope for scope in SCOPES if scope not in found.refusals]
    names = (
        write.parameter.partition(f".{layer}.")[2]
        for layer, parts in (found.writes.by_layer if found.writes else {}).items()
        for write in parts.writes
    )
    slots, count = tuple(dict.fromkeys(names)), anatomy.layer_count
    routes = tuple(
        CatalogueRoute(
            *(scope, ABLATION, slots, (), f"{count} of {count}"), found.verdicts[scope].greedy_equal
        )
        for scope in exact
    )
    return CatalogueEntry(
        model_type, ABLATION, routes, None if routes else found.refusals[SCOPES[0]]
    )


def _summarise(route: SiteRoute, layer_count: int) -> CatalogueRoute:
    if route.rewriter is not None:
        names = [route.rewriter.name]
    else:
        names = [
            slot.bias.partition(f".{layer}.")[2]
            for layer in route.layers
            for slot in route.slots[layer]
        ]
    return CatalogueRoute(
        route.route,
        route.kind,
        tuple(dict.fromkeys(names)),
        tuple(route.flags),
        f"{len(route.layers)} of {layer_count}",
        route.twin.greedy_equal,
    )


def _refuse(model_type: str, reason: str) -> list[CatalogueEntry]:
    return [CatalogueEntry(model_type, site, (), reason) for site in (*SITES, ABLATION)]


def examine_all(
    model_types: Sequence[str] | None = None,
    *,
    processes: int = PROCESSES,
    time_limit: float = TIME_LIMIT,
) -> Iterator[list[CatalogueEntry]]:
    """Yield the entries of each architecture as they are found, in the order of `model_types`.

    time_limit: seconds of processor time for one architecture; then its process ends and it is refused.
    """
    names = list(list_model_types() if model_types is None else model_types)
    workers = [_Worker(time_limit) for _ in range(min(processes, len(names)))]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def examine_next(name: str) -> list[CatalogueEntry]:
        worker = idle.get()
        try:
            return worker.examine(name)
        finally:
            idle.put(worker)

    # The standard pools of processes do not outlive one that ends: theirs breaks, or waits for ever.
    with ThreadPoolExecutor(max(1, len(workers))) as threads:
        try:
            yield from threads.map(examine_next, names)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:  # One that still examines is not waited for.
                worker.process.terminate()
            threads.shutdown()
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that examines one architecture at a time; another takes its place when it ends."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self._start()

    def _start(self) -> None:
        # A fresh interpreter: forking a process that has used torch's threads can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(theirs, self.time_limit), daemon=True
        )
        self.process.start()
        theirs.close()

    def examine(self, name: str) -> list[CatalogueEntry]:
        """Return an architecture's entries, or refusals where the process took too long or ended."""
        self.connection.send(name)
        try:
            if self.connection.poll(PATIENCE * self.time_limit):
                found: list[CatalogueEntry] = self.connection.recv()
                return found
            reason = self._late
        except (EOFError, OSError):
            self.process.join()
            slow = self.process.exitcode == -signal.SIGPROF
            reason = self._late if slow else "its process ended while it was examined"
        self.stop()
        self._start()
        return _refuse(name, f"{name}: {reason}")

    @property
    def _late(self) -> str:
        return f"not examined within {self.time_limit:g} seconds"

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, time_limit: float) -> None:
    """Examine what is asked for until the other end is closed, or one takes too long."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Of 190 architectures, none of whose warnings is bake's.
    while True:
        try:
            model_type = connection.recv()
        except EOFError:
            return
        # Its default action ends the process, whatever that does.
        signal.setitimer(signal.ITIMER_PROF, time_limit)
        try:
            found = examine_model_type(model_type)
        except Exception as error:  # Reported as such: one architecture must not end the catalogue.
            found = _refuse(model_type, f"{model_type}: {type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(found)
