"""Where the run's actors are placed on a cluster, what is missing there, and which hosts are about to go."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.cluster import RUN_VARIABLE
from scorer.config import ScoringConfig

Labels = Mapping[str, str]

# Of the head alone: where controller and REST service sit, whatever else becomes idle and is removed.
ON_HEAD: dict[str, Any] = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}


def scorer_options(scoring: ScoringConfig) -> dict[str, Any]:
    """Ray's options for a scorer. It is placed by itself, never in a placement group such as the trainer's."""
    options: dict[str, Any] = {
        "num_cpus": scoring.cpus,
        "num_gpus": scoring.gpus,
        "scheduling_strategy": "DEFAULT",
    }
    if scoring.resources:
        options["resources"] = dict(scoring.resources)
    if scoring.labels:
        options["label_selector"] = dict(scoring.labels)
    if scoring.fallback_labels:
        options["fallback_strategy"] = [{"label_selector": dict(labels)} for labels in scoring.fallback_labels]
    return options


def needs_of(scoring: ScoringConfig) -> dict[str, float]:
    """What one scorer takes, by Ray's names."""
    needs = {"CPU": scoring.cpus, "GPU": scoring.gpus, **scoring.resources}
    return {name: amount for name, amount in needs.items() if amount > 0}


def missing(needs: Mapping[str, float], wanted: Sequence[Labels], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """What no host has that a scorer needs, in words; None when one could be placed, were nothing else there.

    Args:
        needs: amounts by resource, all of one host.
        wanted: labels of a fitting host; the first, or else the next ones. None at all fits every host.
        nodes: `ray.nodes()`.
    """
    alive = [node for node in nodes if node["Alive"]]
    fitting = [node for node in alive if not wanted or any(_has(node.get("Labels", {}), labels) for labels in wanted)]
    if not fitting:
        names = " or ".join(", ".join(f"{key}={value}" for key, value in labels.items()) for labels in wanted)
        return f"a host with the label {names} (of {len(alive)} hosts none has it)"
    if any(all(node["Resources"].get(name, 0) >= amount for name, amount in needs.items()) for node in fitting):
        return None
    most = {name: max(node["Resources"].get(name, 0) for node in fitting) for name in needs}
    lacking = [f"{needs[name]:g} {name} (there are {most[name]:g})" for name in needs if needs[name] > most[name]]
    return " and ".join(lacking) or "all of " + ", ".join(f"{n:g} {name}" for name, n in needs.items()) + " on one host"


def draining_nodes() -> set[str]:
    """Ids of the hosts that are about to go: announced preemptions, and those that the cluster scales down.

    A cluster of the run's own is this host alone; it is not asked, since the answer would never come once its GCS died.
    """
    import ray

    if RUN_VARIABLE in os.environ:
        return set()
    return set(ray._private.state.state.get_draining_nodes())  # what Ray Train itself asks; there is no public way


def _has(there: Labels, wanted: Labels) -> bool:
    """Ray's label selectors: a value, !value, in(a, b) or !in(a, b)."""
    return all(_matches(there.get(key), value) for key, value in wanted.items())


def _matches(found: str | None, wanted: str) -> bool:
    if wanted.startswith("!"):
        return not _matches(found, wanted[1:])
    if wanted.startswith("in(") and wanted.endswith(")"):
        return found in {one.strip() for one in wanted[3:-1].split(",")}
    return found == wanted
