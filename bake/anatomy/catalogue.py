"""Every architecture of the installed transformers: which sites are exact, by which route, why not else.

Each is examined on its default configuration, in one of a few processes, with a limit on the processor
time that it takes, which a busy machine does not change: 190 constructors written by as many hands include
some that never come back.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import TYPE_CHECKING, Any

from bake.anatomy.examination import examine
from bake.anatomy.routes import SiteRoute
from bake.anatomy.tables import COMPLETIONS
from bake.checkpoint.loading import quiet_transformers
from bake.errors import BakeError, UnsupportedError
from bake.sites import SITES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROCESSES, TIME_LIMIT = 2, 60.0
PATIENCE = (
    20  # times the limit, by the clock: for a process that waits for something and never comes back
)


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
    """One site of one architecture: its exact routes, or the reason why it has none."""

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
    """Return what is exact at each site of one architecture, on its default configuration."""
    try:
        with quiet_transformers():
            anatomy = examine(default_config(model_type))
    except BakeError as error:
        return _refuse(model_type, str(error))
    return [
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
    return [CatalogueEntry(model_type, site, (), reason) for site in SITES]


def examine_all(
    model_types: Sequence[str] | None = None,
    *,
    processes: int = PROCESSES,
    time_limit: float = TIME_LIMIT,
) -> Iterator[list[CatalogueEntry]]:
    """Yield the entries of each architecture as they are found, in the order of `model_types`.

    time_limit: seconds of processor time for one architecture; then its process ends and it is refused.
    """
    waiting = list(list_model_types() if model_types is None else model_types)
    order, done = list(waiting), dict[str, list[CatalogueEntry]]()
    workers = [_Worker(time_limit) for _ in range(min(processes, len(waiting)))]
    position = 0
    try:
        while position < len(order):
            for index, worker in enumerate(workers):
                if worker.model_type is None and waiting:
                    worker.start(waiting.pop(0))
                elif worker.model_type is not None and worker.remaining <= 0:
                    done[worker.model_type] = worker.give_up(worker.model_type)
                    workers[index] = _Worker(time_limit)
            busy = {
                worker.connection: worker for worker in workers if worker.model_type is not None
            }
            patience = min((w.remaining for w in busy.values()), default=0.0)
            for connection in wait(list(busy), timeout=max(0.0, patience)):
                worker = busy[connection]  # type: ignore[index]
                name = str(worker.model_type)
                done[name] = worker.receive()
                if worker.model_type is None and not worker.process.is_alive():
                    workers[workers.index(worker)] = _Worker(time_limit)
            while position < len(order) and order[position] in done:
                yield done[order[position]]
                position += 1
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that examines one architecture at a time, and can be ended."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        # A fresh interpreter: forking a process that has used torch's threads can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(theirs, time_limit), daemon=True
        )
        self.process.start()
        theirs.close()
        self.model_type: str | None = None
        self._started = 0.0

    def start(self, model_type: str) -> None:
        self.model_type, self._started = model_type, monotonic()
        self.connection.send(model_type)

    @property
    def remaining(self) -> float:
        """Seconds by the clock until nobody waits for it any more."""
        return PATIENCE * self.time_limit - (monotonic() - self._started)

    def give_up(self, name: str) -> list[CatalogueEntry]:
        self.stop()
        return _refuse(name, f"{name}: not examined within {self.time_limit:g} seconds")

    def receive(self) -> list[CatalogueEntry]:
        name, self.model_type = str(self.model_type), None
        try:
            found: list[CatalogueEntry] = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            if self.process.exitcode == -signal.SIGPROF:
                return self.give_up(name)
            self.stop()
            return _refuse(name, f"{name}: its process ended while it was examined")
        return found

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
