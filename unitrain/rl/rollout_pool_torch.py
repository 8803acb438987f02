"""Responses to a step's prompts from a pool of actors, in the same numbers as the policy's own ranks would draw them.

Rank 0 has the pool. In step s it sends out the prompts of step s + max_staleness with the weights of version s, and
then takes what was sent out for step s: which weights draw which sample does not depend on who is fast, or dies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.records import Records
from ..errors import UnitrainError, UserError
from .buffer import Buffer, Group
from .dispatch import GivenUp, calls
from .prompts import Request
from .recipe import RL
from .rewards import RewardFailed, RewardFailure, Rewards
from .rollout_torch import Tell, exchanged, refuse_failed, sample_of, scored, stopping
from .rollout_worker import PromptsFailed, RolloutFailed, WeightsDiffer
from .rows_torch import Rows
from .sampler import Weights
from .samples import Sample
from .sampling import Sampling
from .weights_torch import Outbox

_ROUND_SECONDS = 1.0  # after which ranks that wait for rank 0 hear that it still does
_KINDS: Mapping[str, type[UnitrainError]] = {
    kind.__name__: kind for kind in (RewardFailed, RolloutFailed, PromptsFailed, WeightsDiffer, UserError)
}


class PoolRollout:
    """See LocalRollout, whose place it takes. `pool` and `rewards` are None on all ranks but the first."""

    def __init__(
        self,
        options: RL,
        outbox: Outbox,
        rows: Rows,
        share: Callable[[str], str],
        pool: Any,
        rewards: Rewards | None,
        *,
        prompts: int,
        requests: Callable[[int], Sequence[Request]],
        steps: int,
        beat: Callable[[], None],
        tell: Tell,
    ) -> None:
        """`requests` are those of any step; `steps` is the last one; `beat` says that this rank is alive."""
        self.options, self.outbox, self.rows, self.share = options, outbox, rows, share
        self.pool, self.rewards = pool, rewards
        self._prompts, self._requests, self._steps, self._beat, self.tell = prompts, requests, steps, beat, tell
        self._buffer: Buffer | None = None  # rank 0's
        self._next: int | None = None  # the step that it is ready for
        self._sent: set[int] = set()  # steps whose prompts are on their way, or here
        self._waits: int | None = None  # version of weights that are sent before prompts are
        self._busy = 0.0  # seconds of all actors together, since the step before
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, float] = {}

    def samples(
        self, requests: Sequence[Request], records: Records, sampling: Sampling, *, version: int, max_failures: int = 0
    ) -> list[Sample]:
        """Samples of a step's requests, in order, the same on every rank; without those that were given up.

        A collective. Raises, on all ranks, RewardFailed, RolloutFailed, WeightsDiffer.
        """
        if self._next != requests[0].step:
            self.load(requests[0].step, None)
        sampling = stopping(sampling, records)
        began = time.monotonic()
        weights = self.outbox.gather(version)
        self.seconds = {"generate": 0.0, "reward": 0.0, "sync": time.monotonic() - began}
        samples: list[Sample] = []
        failures: list[RewardFailure] = []
        if self.rows.rank == 0:
            error: Exception | None = None
            try:
                self._begin(version, weights)
                while not self._take(requests[0].step):
                    if self.rows.size > 1:
                        self.share('{"wait": true}')
                    self._beat()
                samples, failures = self._finish(records, sampling)
            except Exception as raised:  # the other ranks must hear of it, whatever it is
                error = raised
            outcome = {} if error is None else {"kind": type(error).__name__, "error": str(error)}
            self.share(json.dumps(outcome))
            if error is not None:
                raise error
        else:
            while (outcome := json.loads(self.share(""))) and "wait" in outcome:
                self._beat()
            if outcome:
                raise _KINDS.get(outcome["kind"], RolloutFailed)(outcome["error"])
        total = sum(request.samples for request in requests)
        names = [each.name or each.function.rpartition(":")[2] for each in self.options.reward.all]
        samples = exchanged(self.rows, requests, records, samples, range(total), sampling, names)
        refuse_failed(self.rows, samples, failures, 0, max_failures, self.tell)
        if not samples:
            raise PromptsFailed(f"no prompt of step {requests[0].step + 1} has an answer")
        self._next = requests[0].step + 1
        return samples

    def state(self, step: int, keep: str) -> dict[str, Any]:
        """For a checkpoint before this step; with `save` it waits for what is on its way. Rank 0 knows it."""
        buffer = self._buffer
        if buffer is None:
            return Buffer(prompts=self._prompts, max_staleness=self.options.max_staleness, step=step).state()
        if keep == "save":
            while self.pool.busy:
                self._put(self.pool.poll(_ROUND_SECONDS))
                self._beat()
        return buffer.state(keep)

    def load(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint, or begin: nothing that is on its way counts any more. Call it on all ranks."""
        self._next = step
        buffer = Buffer(prompts=self._prompts, max_staleness=self.options.max_staleness, step=step)
        if self.rows.rank == 0:
            if state is not None and state["step"] == step:
                buffer.load(state)
                if lost := len(state["groups"]) - len(buffer):
                    self.tell("rollout_dropped", groups=lost, error="older than rl.max_staleness allows: drawn again")
            self._buffer, self._sent = buffer, set()
            self.pool.forget()
        self.outbox.again()

    # On rank 0.

    def _begin(self, version: int, weights: Weights) -> None:
        """Send the weights."""
        began = time.monotonic()
        self.pool.publish(weights)
        if not self.options.max_staleness:
            self.pool.send(version)  # generation would wait for it anyway; so it is seen what it takes
        self._busy, self._waits = 0.0, version
        self.seconds["sync"] += time.monotonic() - began

    def _take(self, step: int) -> bool:
        """Wait a while for answers; True once all of the step are here."""
        assert self._buffer is not None, "by load"
        began = time.monotonic()
        if self._waits is not None:
            while not self.options.max_staleness and self.pool.loading and time.monotonic() - began < _ROUND_SECONDS:
                self._put(self.pool.poll(_ROUND_SECONDS))
            self.seconds["sync"] += time.monotonic() - began
            if not self.options.max_staleness and self.pool.loading:
                return False
            self._ask(step, self._waits)
            self._waits, began = None, time.monotonic()
        while self._buffer.missing(step) and time.monotonic() - began < _ROUND_SECONDS:
            self._put(self.pool.poll(_ROUND_SECONDS))
        self.seconds["generate"] += time.monotonic() - began
        return not self._buffer.missing(step)

    def _ask(self, step: int, version: int) -> None:
        """Send out all prompts, up to max_staleness steps ahead, that are to be answered by this version."""
        assert self._buffer is not None, "by load"
        at_once = self.options.rollout.prompts_per_call
        for ahead in range(step, min(step + self.options.max_staleness, self._steps - 1) + 1):
            if ahead not in self._sent and self._buffer.may_generate(ahead, version):
                self._sent.add(ahead)
                self.pool.dispatch(calls(self._requests(ahead), version, at_once, self._buffer.missing(ahead)))

    def _put(self, came: Sequence[Any]) -> None:
        assert self._buffer is not None, "since _begin"
        for each in came:
            if isinstance(each, GivenUp):
                request = each.request
                self.tell("prompt_dropped", for_step=request.step + 1, prompt=request.prompt, error=each.why)
                self._buffer.drop(request.step, request.place, each.why)
                continue
            call, answers = each
            self._busy += answers.seconds
            row = 0
            for request in call.requests:
                prompt, samples = self.pool.prompts(request.prompt), []
                for index in request.indices:
                    length = int(answers.lengths[row])
                    tokens, logprobs = answers.tokens[row, :length].copy(), answers.logprobs[row, :length].copy()
                    ended = bool(answers.ended[row])
                    samples.append(sample_of(request, index, answers.version, prompt, tokens, logprobs, ended))
                    row += 1
                self._buffer.add(Group(request.step, request.place, tuple(samples)))

    def _finish(self, records: Records, sampling: Sampling) -> tuple[list[Sample], list[RewardFailure]]:
        """The step's samples with rewards. Raises RolloutFailed where too many prompts have none."""
        assert self._buffer is not None, "since _begin"
        taken = self._buffer.take()
        most = self.options.rollout.max_failures
        if len(taken.dropped) > most:
            place, why = next(iter(taken.dropped.items()))
            raise PromptsFailed(
                f"prompt {place} of step {self._buffer.step} has no answer: {why}; {len(taken.dropped)} of "
                f"{self._prompts} prompts have none, at most {most} may (rl.rollout.max_failures)"
            )
        began = time.monotonic()
        drawn = [sample for group in taken.groups for sample in group.samples]
        found = scored(self.rewards, drawn, records, sampling)
        self.seconds["reward"] = time.monotonic() - began
        self.seconds["generating"] = self._busy
        self.facts = {"dropped": float(len(taken.dropped)), "replaced": float(self.pool.replaced)}
        return found
