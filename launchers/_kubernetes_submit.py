"""What is asked of a cluster before objects are made in it, and how they are made: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unitrain.errors import Refused
from unitrain.launchers._kubernetes_cluster import Cluster, Refusal, lost_fields, plural_of
from unitrain.launchers._kubernetes_kinds import KINDS, Kind, choose
from unitrain.launchers._kubernetes_options import Wishes


def chosen(cluster: Cluster, wishes: Wishes, minor: int, version: str) -> Kind:
    """The kind that was asked for, or the best that the cluster has."""
    apis = cluster.apis()
    if wishes.kind is None:
        return choose(apis, minor)
    kind = KINDS[wishes.kind]
    if kind.api not in apis or minor < kind.since:
        there = choose(apis, minor).name
        raise Refused(
            f"this cluster ({version}) has no {kind.name} of {kind.api}; leave launcher.options.kind out for "
            f"{there!r}, or install what brings it"
        )
    return kind


def runs_pods(body: Mapping[str, Any]) -> bool:
    """True for the objects whose pods the run is."""
    return body["kind"] not in ("ConfigMap", "Service")


def check_references(cluster: Cluster, wishes: Wishes, kind: Kind) -> None:
    """Refuse what pods would wait for in vain. What one may not look at is left to them, and Secrets are not read."""
    volumes = [wishes.volume or {}, *wishes.mounts]
    named = [
        ("persistentvolumeclaims", "PersistentVolumeClaim", volume["claim"]) for volume in volumes if "claim" in volume
    ]
    named += [("configmaps", "ConfigMap", volume["config_map"]) for volume in volumes if "config_map" in volume]
    if wishes.service_account:
        named.append(("serviceaccounts", "ServiceAccount", wishes.service_account))
    for plural, what, name in named:
        if not _may_be_there(cluster, plural, name):
            raise Refused(
                f"there is no {what} {name!r} in namespace {cluster.namespace!r}; make it, or name another one"
            )
    if kind.name == "trainjob" and not _may_be_there(cluster, "clustertrainingruntimes", wishes.runtime, kind.api):
        raise Refused(
            f"the cluster has no ClusterTrainingRuntime {wishes.runtime!r}; name one in launcher.options.runtime, or "
            "set launcher.options.kind to another kind"
        )


def _may_be_there(cluster: Cluster, plural: str, name: str, api: str = "v1") -> bool:
    try:
        return cluster.get(api, plural, name, of_cluster=api != "v1") is not None
    except Refusal as refusal:
        if refusal.status == 403:
            return True
        raise


def try_out(cluster: Cluster, body: Mapping[str, Any], kind: Kind, version: str) -> None:
    """Have the server check an object as if it were made, and refuse to send what it would not keep."""
    plural = plural_of(body, kind.plural)
    made = cluster.create(body, plural=plural, dry_run=True)
    if lost := list(lost_fields(body, made)):
        raise Refused(
            f"this cluster ({version}) does not know {', '.join(lost[:5])} of {body['kind']}; set another "
            "launcher.options.kind, or leave out the option that asks for it"
        )


def make(cluster: Cluster, objects: list[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """Make the objects in turn; where one is refused, take back those before it."""
    made: list[dict[str, Any]] = []
    try:
        for body in objects:
            made.append({**body, **cluster.create(body, plural=plural_of(body, kind.plural))})
        owners = [body for body in made if runs_pods(body)]
        for body in made:
            if not runs_pods(body):
                cluster.own(body, plural=plural_of(body, kind.plural), owners=owners)
    except BaseException:
        for body in reversed(made):
            cluster.delete(body["apiVersion"], plural_of(body, kind.plural), body["metadata"]["name"])
        raise
    return made
