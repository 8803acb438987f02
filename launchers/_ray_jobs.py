"""The Jobs API of a running Ray cluster, by its REST interface: submit, look, stop.

Ray's own client would do the same, but it obeys RAY_ADDRESS rather than the address that it is given, and it takes
seconds to import where a status is asked.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from unitrain.errors import UnitrainError, UserError
from unitrain.world import environment

ANSWER_SECONDS = 30.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_MOST_BYTES = 16 << 20


class NotReached(UnitrainError):
    """The cluster does not answer, which tells nothing of its jobs."""


class Refusal(UserError):
    """The cluster's own answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Jobs:
    """Those of one cluster."""

    def __init__(self, address: str, ca_file: str | None = None) -> None:
        self.address = address
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if address.startswith("https:"):
            try:
                handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))
            except OSError as error:
                raise UserError(f"launcher.options.ca_file is {ca_file}, which cannot be used: {error}") from error
        self._opener = urllib.request.build_opener(*handlers)

    def submit(self, submission_id: str, *, entrypoint: str, variables: Mapping[str, str], run: str) -> str:
        """Start a job; its id, which has a number behind it where there has been one of that name."""
        for number in range(1, 1000):
            name = submission_id if number == 1 else f"{submission_id}-{number}"
            if self.look(name) is not None:
                continue
            body = {
                "entrypoint": entrypoint,
                "submission_id": name,
                "runtime_env": {"env_vars": dict(variables)} if variables else {},
                "metadata": {"unitrain": run},
            }
            self._ask("POST", "/api/jobs/", body)
            return name
        raise UserError(f"the cluster at {self.address} has had {submission_id} a thousand times; use another folder")

    def look(self, job_id: str) -> dict[str, Any] | None:
        """What the cluster knows of a job, `status` and `message` among it; None where it knows nothing."""
        try:
            found = self._ask("GET", f"/api/jobs/{quote(job_id, safe='')}")
        except Refusal as refusal:
            if refusal.status == 404:
                return None
            raise
        return found

    def stop(self, job_id: str) -> None:
        """SIGTERM to the job's entrypoint and, a little later, SIGKILL."""
        self._ask("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, method=method)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        if (token := _token()) is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
                found = json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise Refusal(self._why(error), error.code) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NotReached(f"the Ray cluster at {self.address} does not answer: {reason}") from error
        if not isinstance(found, dict):
            raise NotReached(f"what answers at {self.address} is no Jobs API of Ray")
        return found

    def _why(self, error: urllib.error.HTTPError) -> str:
        with error:
            said = error.read(_MOST_BYTES).decode(errors="replace").strip()
        if error.code in (401, 403):
            return f"the Ray cluster at {self.address} wants another token ({said[:200]}); set RAY_AUTH_TOKEN"
        if 300 <= error.code < 400:
            return f"{self.address} only leads to {error.headers.get('Location', 'another address')[:200]}; give that"
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return f"the Ray cluster at {self.address} refuses: {lines[-1][:500] if lines else error.reason}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the address that was given, and for no other."""

    def redirect_request(self, *given: Any, **more: Any) -> None:
        return None


def _token() -> str | None:
    """The cluster's, from where Ray's own commands take it."""
    variables = environment()
    if token := variables.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if variables.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    path = Path(variables.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise UserError(f"RAY_AUTH_MODE is token, and {path} cannot be read: {error.strerror}") from error
