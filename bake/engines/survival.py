"""Where a bake survives: what inference engines other than transformers do with its biases.

The facts are data, `facts.toml`, each with the version that it was seen in; what was not checked is
unknown and never guessed. transformers needs no fact: every bake is proven in it. That an engine runs
a model at all, fast or in a given dtype, is not its subject.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from bake.errors import UnsupportedError

Verdict = Literal["kept", "dropped", "error", "unknown"]

_FACTS = Path(__file__).with_name("facts.toml")
_PROVEN_IN = "transformers"
_USUAL_THETA = 10000.0  # what engines take where a config does not say
_PHRASES = {
    "kept": "survives",
    "dropped": "is dropped",
    "error": "does not load",
    "unknown": "is not known",
}


@dataclass(frozen=True)
class Outline:
    """What an engine sees of a baked checkpoint: its architecture and the parameters that are new to it.

    model_type: the output's, which is a host's where one is used. pushed: names of the parameters that
    hold the push. created: all that the bake creates; what no push goes to is zero. Names may be whole
    or begin inside the decoder layer. settings: the config keys by which a host computes what the base did,
    and their values. rotation: the rotary positions of a config.json that has them as transformers 5 spells
    them (`rope_parameters`) and not as before; None where it has both, the older, or none.
    """

    model_type: str
    pushed: tuple[str, ...]
    created: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    rotation: Mapping[str, Any] | None = None


def find_rotation(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return an Outline's `rotation` of what config.json says, of a wrapper's decoder where it is one."""
    nested = values.get("text_config")
    decoder = nested if isinstance(nested, Mapping) and "rope_parameters" in nested else values
    found = decoder.get("rope_parameters")
    if not isinstance(found, Mapping) or {"rope_theta", "rope_scaling"} & decoder.keys():
        return None
    return found


@dataclass(frozen=True)
class Survival:
    """What one engine does with a bake.

    engine: its key, as `--target` takes it; name and version: as people say them. verdict: `kept`,
    `dropped` (the engine runs and the push, or a part of it or of the base, is gone), `error` (it does
    not load) or `unknown`. reason: a phrase without a full stop. seen: how the fact is known.
    """

    engine: str
    name: str
    version: str
    verdict: Verdict
    reason: str
    seen: str

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"

    def describe(self) -> str:
        """Say the verdict and its reason as the end of a sentence about a bake."""
        return f"{_PHRASES[self.verdict]} ({self.reason})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`, where the engine is the key."""
        return {
            "name": self.name,
            "version": self.version,
            "verdict": self.verdict,
            "reason": self.reason,
            "seen": self.seen,
        }


@cache
def read_facts() -> Mapping[str, Mapping[str, Any]]:
    """Return `facts.toml`: {engine: its facts}; one that runs another's models has that one's."""
    found = tomllib.loads(_FACTS.read_text(encoding="utf-8"))
    return {
        name: {**found[facts["runs"]], **facts, "version": f"on {found[facts['runs']]['version']}"}
        if "runs" in facts
        else facts
        for name, facts in found.items()
    }


def engine_names() -> tuple[str, ...]:
    """Return every engine that `--target` takes, transformers first."""
    return (_PROVEN_IN, *read_facts())


def check_engine(engine: str) -> str:
    """Return `engine` if `--target` takes it; raise UnsupportedError naming them otherwise."""
    if engine not in engine_names():
        raise UnsupportedError(
            f"unknown target {engine!r}; the engines are {', '.join(engine_names())}"
        )
    return engine


def survival(
    engine: str,
    model_type: str,
    slots: Iterable[str],
    new_parameters: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
    rotation: Mapping[str, Any] | None = None,
) -> Survival:
    """Say what an engine does with a checkpoint of `model_type`.

    slots: names of the parameters that hold the push. new_parameters: names of all parameters that the
    bake creates; those that are no slot are zero, so it does no harm where an engine drops them. settings,
    rotation: see Outline. Raises KeyError for an engine that is not in `engine_names()`.
    """
    if engine == _PROVEN_IN:
        return Survival(engine, engine, version(engine), "kept", "proven by loading it", "run")
    facts = read_facts()[engine]
    verdict, reason = _judge(facts, model_type, _in_layer(slots), _in_layer(new_parameters))
    family = facts["reads"].get(model_type)
    if verdict == "kept" and family is not None:
        verdict, reason = _judge_settings(family, settings or {}) or (verdict, reason)
    if verdict == "kept" and rotation is not None and "spelling" in facts:
        verdict, reason = _judge_rotation(facts, family or {}, rotation) or (verdict, reason)
    seen = f"read: {facts['source']}" if verdict != "unknown" else "not checked"
    if family is not None:
        seen = f"{family.get('checked', facts['checked'])}: {family['file']}"
    return Survival(engine, facts["name"], facts["version"], verdict, reason, seen)


def survivals(outline: Outline | None) -> tuple[Survival, ...]:
    """Say what every engine does with a checkpoint; None: not known before the base is rewritten.

    Those that run another's code are left out, because they do what it does.
    """
    facts = read_facts()
    own = [name for name in engine_names() if "runs" not in facts.get(name, {})]
    return tuple(survival_of(engine, outline) for engine in own)


def survival_of(engine: str, outline: Outline | None) -> Survival:
    """Say what one engine does with a checkpoint; None: not known before the base is rewritten."""
    if outline is not None:
        return survival(
            engine,
            outline.model_type,
            outline.pushed,
            outline.created,
            outline.settings,
            outline.rotation,
        )
    if engine == _PROVEN_IN:
        return survival(engine, "", ())
    facts = read_facts()[engine]
    reason = "the route's parameters are known only when it is planned"
    return Survival(engine, facts["name"], facts["version"], "unknown", reason, "not checked")


def known_types(engine: str) -> list[str]:
    """Return the model types of which it is known what an engine reads, sorted."""
    facts = read_facts()[engine]
    return sorted({*facts["reads"], *facts.get("transformers", ())})


def to_values(found: Iterable[Survival]) -> dict[str, Any]:
    """Return plain values for `bake.json`: {engine: its Survival}."""
    return {entry.engine: entry.to_dict() for entry in found}


def describe_survivals(found: Sequence[Survival], *, brief: bool = False) -> str:
    """Say in one line where a bake survives and where not. brief: without versions and reasons."""
    kept = [entry.name if brief else entry.label for entry in found if entry.verdict == "kept"]
    parts = [f"survives in {', '.join(kept)}"] if kept else ["survives nowhere that is known"]
    phrases = {"dropped": "dropped by", "error": "does not load in", "unknown": "unknown in"}
    for verdict, phrase in phrases.items():
        entries = [entry for entry in found if entry.verdict == verdict]
        if entries and (brief or verdict == "unknown"):
            parts.append(f"{phrase} {', '.join(entry.name for entry in entries)}")
        elif entries:
            told = (f"{entry.label} ({entry.reason})" for entry in entries)
            parts.append(f"{phrase} {', '.join(told)}")
    return "; ".join(parts)


def _judge_settings(
    family: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Verdict, str] | None:
    """Return verdict and reason where a host's settings are more than the engine's code computes."""
    lost = sorted({*settings} & {*family.get("loses", ())})
    if lost:
        return "dropped", f"does not read {', '.join(lost)}, without which it is another model"
    for key, known in family.get("only", {}).items():
        given = _look_up(settings, key)
        if given is not None and given not in known:
            reason = f"computes {' or '.join(known)} whatever {key} says, and it is {given} here"
            return family.get("otherwise", "dropped"), reason
    for key, value in family.get("never", {}).items():
        given = settings.get(key)
        if isinstance(given, list | tuple) and given and set(given) == {value}:
            return "error", f"cannot load it where every entry of {key} is {value}"
    return None


def _look_up(settings: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None where it is not there."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _judge_rotation(
    facts: Mapping[str, Any], family: Mapping[str, Any], rotation: Mapping[str, Any]
) -> tuple[Verdict, str] | None:
    """Return verdict and reason where config.json says the rotation in a spelling that is not read."""
    told = f"reads {facts['spelling']}, and config.json has rope_parameters alone"
    if "respelled" in family:
        return family["respelled"], f"{told}: already the base goes wrong there"
    kind = (rotation.get("rope_type", "default"), rotation.get("partial_rotary_factor", 1.0))
    if kind == ("default", 1.0) and rotation.get("rope_theta") == _USUAL_THETA:
        return None
    return "unknown", f"{told}: it takes its own defaults, for the base too"


def _judge(
    facts: Mapping[str, Any], model_type: str, pushed: Sequence[str], created: Sequence[str]
) -> tuple[Verdict, str]:
    """Return verdict and reason for parameters named inside the layer."""
    name = facts["name"]
    if model_type in facts["absent"]:
        return "error", f"{name} has no code for {model_type}"
    if model_type in facts.get("transformers", ()):
        return "kept", "runs transformers' own module"
    family = facts["reads"].get(model_type)
    if family is None:
        return "unknown", f"what {name} does with {model_type} was not checked"
    if "broken" in family:
        return "error", str(family["broken"])
    unread = [slot for slot in pushed if not _reads(family, slot)]
    beside = [other for other in created if other not in pushed and not _reads(family, other)]
    verdict: Verdict = family.get("unread", facts["unread"])
    misread = [slot for slot in pushed if any(_matches(slot, g) for g in family.get("misread", ()))]
    if misread and not unread:
        return "dropped", f"takes {', '.join(misread)} for something else: {family['file']}"
    if beside and not unread and facts.get("zeros"):
        return "kept", f"reads {', '.join(pushed)}; {facts['zeros']}"
    if unread or (beside and verdict == "error"):
        how = family.get("how", facts["how"])
        return verdict, f"no slot for {', '.join(unread or beside)}, {how}"
    return "kept", f"reads {', '.join(pushed)}"


def _reads(family: Mapping[str, Any], name: str) -> bool:
    """Tell whether an engine reads a parameter; stock weights it reads wherever it has the code."""
    return not name.endswith("bias") or any(_matches(name, glob) for glob in family["reads"])


def _matches(name: str, glob: str) -> bool:
    """Match a glob whose `*` stands for anything without a dot."""
    pattern = re.escape(glob).replace(r"\*", r"[^.]*").replace(r"\[", "[").replace(r"\]", "]")
    return re.fullmatch(pattern, name) is not None


def _in_layer(names: Iterable[str]) -> list[str]:
    """Return names without what comes before and with the layer's index, each once."""
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name, count=1) for name in names))
