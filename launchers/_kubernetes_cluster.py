"""The way to a cluster's API server: the official client's connections, plain objects, clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from unitrain.errors import MissingExtra, UserError

Object = dict[str, Any]

_SECONDS = 30.0
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PLURALS = {"ConfigMap": "configmaps", "Service": "services"}
_VERBS = {"POST": "create", "GET": "get", "DELETE": "delete", "PATCH": "patch"}


class Refusal(UserError):
    """The server does not do what it was asked; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passes(self) -> bool:
        """True where asking again may help: nobody answers, or the server has too much to do or is in trouble."""
        return self.status in (0, 429) or self.status >= 500


class Cluster:
    """One namespace of a cluster."""

    def __init__(
        self, *, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None
    ) -> None:
        """From a kubeconfig file, or from inside a pod. Raises UserError where there is neither, or no client."""
        try:
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            raise MissingExtra("launcher 'kubernetes'", "the kubernetes client", "kubernetes") from error
        configuration = client.Configuration()
        given: dict[str, Any] = {"config_file": kubeconfig, "context": context, "client_configuration": configuration}
        self.namespace = namespace or ""
        try:
            config.load_kube_config(**given)  # type: ignore[no-untyped-call]  # the client has no types here
            self.namespace = self.namespace or _namespace(config, kubeconfig, context)
        except config.ConfigException as error:
            self.namespace = self.namespace or _inside(config, configuration)
            if not self.namespace:
                raise UserError(
                    f"no way to a Kubernetes cluster: {error}; set KUBECONFIG to a kubeconfig file, or "
                    "launcher.options.context to one of its contexts"
                ) from error
        self._client = client.ApiClient(configuration)
        self._configuration = configuration

    def version(self) -> tuple[int, str]:
        """The minor version, and the whole one."""
        found = self._json("GET", "/version")
        return int("".join(filter(str.isdigit, str(found["minor"])))), str(found["gitVersion"])

    def apis(self) -> set[str]:
        """Every group/version that the server has."""
        groups = self._json("GET", "/apis")["groups"]
        return {version["groupVersion"] for group in groups for version in group["versions"]}

    def create(self, body: Mapping[str, Any], *, plural: str, dry_run: bool = False) -> Object:
        """Make an object; the server's form of it. Unknown fields are refused by servers that can (1.25 and later)."""
        query = {"fieldManager": "unitrain", "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self._json("POST", self._path(body["apiVersion"], plural), query, body)

    def get(self, api: str, plural: str, name: str, *, of_cluster: bool = False) -> Object | None:
        """An object of the namespace, or of the whole cluster; None where there is none."""
        try:
            return self._json(
                "GET", f"/apis/{api}/{plural}/{quote(name)}" if of_cluster else self._path(api, plural, name)
            )
        except Refusal as refusal:
            if refusal.status == 404:
                return None
            raise

    def own(self, body: Mapping[str, Any], *, plural: str, owners: Sequence[Object]) -> None:
        """Have the object deleted when its owners are."""
        references = [
            {key: owner[key] for key in ("apiVersion", "kind")}
            | {key: owner["metadata"][key] for key in ("name", "uid")}
            for owner in owners
        ]
        path = self._path(body["apiVersion"], plural, body["metadata"]["name"])
        self._json("PATCH", path, {}, {"metadata": {"ownerReferences": references}})

    def list(self, api: str, plural: str, *, selector: str = "", fields: str = "") -> tuple[list[Object], str]:
        """Objects by labels, or by fields, and as of which version of the cluster."""
        query = {key: value for key, value in (("labelSelector", selector), ("fieldSelector", fields)) if value}
        found = self._json("GET", self._path(api, plural), query)
        return found["items"], str(found["metadata"]["resourceVersion"])

    def changes(self, api: str, plural: str, *, selector: str, since: str, seconds: float) -> Iterator[Object]:
        """Objects as they change after a version, deleted ones as they were last; ends after so many seconds."""
        query = {"labelSelector": selector, "watch": "true", "resourceVersion": since}
        query["timeoutSeconds"] = str(max(1, round(seconds)))
        for line in self._lines(self._path(api, plural), query, seconds + _SECONDS):
            event = json.loads(line)
            if event["type"] == "ERROR":
                return  # the version is too old to be told: whoever asks looks anew
            yield event["object"]

    def delete(self, api: str, plural: str, name: str, *, grace_seconds: int | None = None) -> None:
        """Delete an object, and what it owns after it. One that is gone already is no error."""
        query = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            query["gracePeriodSeconds"] = str(grace_seconds)
        try:
            self._json("DELETE", self._path(api, plural, name), query)
        except Refusal as refusal:
            if refusal.status != 404:
                raise

    def log(self, pod: str, container: str, *, follow: bool) -> Iterator[str]:
        """Lines that a container has printed."""
        query = {"container": container, **({"follow": "true"} if follow else {})}
        return self._lines(self._path("v1", "pods", pod) + "/log", query, None)

    def run(self, pod: str, container: str, command: Sequence[str]) -> Iterator[str]:
        """Lines that a command prints in a running container. Raises UserError with what it says on stderr."""
        from kubernetes import client, stream

        try:
            channel = stream.stream(
                client.CoreV1Api(self._client).connect_get_namespaced_pod_exec,
                pod,
                self.namespace,
                container=container,
                command=list(command),
                stdin=False,
                stdout=True,
                stderr=True,
                tty=False,
                _preload_content=False,
            )
        except client.ApiException as error:
            raise UserError(f"nothing can be run in pod {pod}: {error.reason}") from error
        rest = ""
        while channel.is_open():
            channel.update(timeout=1)
            *lines, rest = (rest + channel.read_stdout(timeout=0)).split("\n")
            yield from lines
        *lines, rest = (rest + channel.read_stdout(timeout=0)).split("\n")
        yield from lines
        if rest:
            yield rest
        if channel.returncode:
            raise UserError(channel.read_stderr(timeout=0).strip() or f"{command[0]} failed in pod {pod}")

    def _lines(self, path: str, query: Mapping[str, str], seconds: float | None) -> Iterator[str]:
        """Of an answer as it comes; the request is made at once."""
        response = self._send("GET", path, query, stream=True, seconds=seconds)

        def lines() -> Iterator[str]:
            rest = b""
            try:
                for data in response.stream(4096, decode_content=True):
                    *whole, rest = (rest + data).split(b"\n")
                    yield from (line.decode(errors="replace") for line in whole)
            except _transport_errors() as error:
                raise UserError(f"the connection to the Kubernetes API server broke off: {_reason(error)}") from error
            finally:
                response.close()
            if rest:
                yield rest.decode(errors="replace")

        return lines()

    def _path(self, api: str, plural: str, name: str = "") -> str:
        root = f"/apis/{api}" if "/" in api else f"/api/{api}"
        return f"{root}/namespaces/{quote(self.namespace)}/{plural}" + (f"/{quote(name)}" if name else "")

    def _json(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None
    ) -> Object:
        response = self._send(method, path, query, body)
        found: Object = json.loads(response.data)
        return found

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        stream: bool = False,
        seconds: float | None = _SECONDS,
    ) -> Any:
        """A request by the client's own connections: their certificates, proxies and tokens are its concern."""
        headers = {"Accept": "application/json, */*", "User-Agent": "unitrain"}
        settings: Any = self._configuration.auth_settings()
        for setting in settings.values():
            if setting.get("in") == "header":
                headers[setting["key"]] = setting["value"]
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        url = f"{self._configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            response = self._client.rest_client.pool_manager.request(
                method, url, body=content, headers=headers, timeout=seconds, preload_content=not stream, retries=False
            )
        except _transport_errors() as error:
            raise Refusal(
                f"the Kubernetes API server at {self._configuration.host} does not answer: {_reason(error)}; "
                "look at your kubeconfig file and network",
                0,
            ) from error
        if response.status >= 400:
            text = response.data if not stream else response.read()
            raise _refusal(method, path, response.status, text)
        return response


def plural_of(body: Mapping[str, Any], jobs: str) -> str:
    """How an object's path names its kind; `jobs` is that of the objects that run pods."""
    return _PLURALS.get(body["kind"], jobs)


def lost_fields(sent: Any, got: Any, path: str = "") -> Iterator[str]:
    """Fields that a server has dropped without a word, as those before 1.25 do with what they do not know."""
    if isinstance(sent, Mapping):
        for key, value in sent.items():
            where = f"{path}.{key}" if path else str(key)
            if not isinstance(got, Mapping) or key not in got:
                if value not in ({}, [], None, "", False):  # servers leave empty values out
                    yield where
            else:
                yield from lost_fields(value, got[key], where)
    elif isinstance(sent, list) and isinstance(got, list):
        for number, (mine, theirs) in enumerate(zip(sent, got, strict=False)):
            yield from lost_fields(mine, theirs, f"{path}[{number}]")


def _namespace(config: Any, kubeconfig: str | None, context: str | None) -> str:
    """That of the context."""
    contexts, current = config.list_kube_config_contexts(kubeconfig)
    chosen = next((known for known in contexts if known["name"] == context), current)
    return str(chosen["context"].get("namespace") or "default")


def _inside(config: Any, configuration: Any) -> str:
    """The namespace of the pod that this runs in, with that pod's rights; empty where it runs in none."""
    try:
        config.load_incluster_config(client_configuration=configuration)
        return (_ACCOUNT / "namespace").read_text().strip()
    except (config.ConfigException, OSError):
        return ""


def _transport_errors() -> tuple[type[Exception], ...]:
    import urllib3

    return (urllib3.exceptions.HTTPError, OSError)


def _reason(error: Exception) -> str:
    """The innermost cause, in its own words."""
    while isinstance(inner := error.__cause__ or error.__context__, Exception):
        error = inner
    return str(error)


def _refusal(method: str, path: str, status: int, content: bytes) -> Refusal:
    """What the server says, with what to do about it."""
    try:
        found = json.loads(content)
        message, causes = str(found.get("message", "")), found.get("details", {}) or {}
    except (ValueError, AttributeError):
        message, causes = content.decode(errors="replace")[:300], {}
    what = f"{causes.get('kind') or path.split('/namespaces/')[-1].partition('/')[2].partition('/')[0]}"
    name = f" {causes['name']!r}" if causes.get("name") else ""
    match status:
        case 401:
            text = (
                "the cluster does not know you: your kubeconfig's credentials are wrong or have expired; log in again"
            )
        case 403 if "exceeded quota" in message:
            text = (
                f"the namespace's quota is used up: {message.partition('exceeded quota: ')[2]}; ask for less, or wait"
            )
        case 403 if "cannot" in message:
            who = message.partition(" is forbidden: ")[2] or message
            text = f"you lack a right in the cluster: {who}; ask its admin for a Role with it (see docs/kubernetes.md)"
        case 403:
            text = f"the cluster forbids it: {message}"
        case 404 if "namespaces" in message and "not found" in message:
            text = f"{message}; make it, or give launcher.options.namespace=NAME"
        case 404:
            text = message
        case 409:
            label = f"unitrain.dev/job={causes.get('name', 'NAME')}"
            text = (
                f"{what}{name} is there already, of an older run in a folder of the same name; delete that with "
                f"`kubectl delete all,configmap -l {label}`, or give another --run-dir"
            )
        case 400 | 422:
            text = f"the cluster refuses {what}{name}: {message}"
        case _:
            text = f"the Kubernetes API server answers {status} to {_VERBS.get(method, method)} {what}: {message}"
    return Refusal(text, status)
