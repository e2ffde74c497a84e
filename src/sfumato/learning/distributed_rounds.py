"""A federation simulated by the processes of `torchrun`: each runs its own clients, the noise enters once.

Rank 0 draws the cohort and the round's random number and tells both; each rank runs those clients of the cohort whose number
leaves its rank over, in the way that its own engine finds fastest; the sums are added up on rank 0, which releases one noised
sum, and every rank lets its copy of the server use the same mean.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from sfumato.errors import ProcessError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import UNCLIPPED
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.distributed import SharedProcedure, Team, split
from sfumato.learning.federated import Answer
from sfumato.learning.procedure import Procedure, Progress
from sfumato.privacy.bounded import Released, Tensors

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def shared(team: Team | None, procedure: Procedure, model: nn.Module, *, saved: bool) -> Procedure:
    """Return the procedure of a federation as the ranks of a team share it; alone, as it is.

    Args:
        team: The ranks, or None.
        procedure: On this rank, over all clients.
        model: The model it trains.
        saved: Whether the run has a checkpoint.

    Raises:
        ProcessError: it can only run in one process.
    """
    if team is None:
        return procedure
    if not isinstance(procedure, ClientRounds):
        raise ProcessError(
            'Federations whose unit is the record run in one process; make the plan with unit "client", or start the script '
            "with plain python."
        )
    if not procedure.aggregation.takes_total and procedure.is_private:
        raise ProcessError(
            f"{type(procedure.aggregation).__name__} needs each client's own sum, and processes only send their total; use "
            "ServerNoise() or CorrelatedNoise(...), or start the script with plain python."
        )
    if saved and procedure.kept_at_first:
        raise ProcessError(
            "A checkpoint does not hold what clients of this algorithm keep in other processes; leave the checkpoint out, "
            "or start the script with plain python."
        )
    return SharedRounds(team, procedure, model)


@final
class SharedRounds(SharedProcedure):
    """Rounds of clients, each of whom always runs on the same rank.

    **Guarantee**: as the rounds that are shared. The sum that is released holds each drawn client's clipped part once, and
    the noise of one release; it is made on rank 0 by the code that a single process runs.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | a cohort without clients of a rank, or an empty one | the rank adds zero and takes part in the round |
    | a private cohort of more than `MAX_UNITS` clients | refused: the rounding of its sum is not covered |
    | clients lost, refused or with NaN on any rank | counted on all ranks together; the quorum is held against that |
    | a void round | void on every rank: nothing is released, nobody keeps anything |
    | ranks with other clients, plans, models, algorithms, weights, quorums or versions | refused before anything is charged |
    | a rank fails, is killed or leaves its loop | as for one curator (`sfumato.learning.distributed.Shared`) |
    | what clients keep (SCAFFOLD, Ditto, FedPer) | it stays on their rank; own models are told to all when the run ends |

    Args:
        team: The ranks.
        rounds: The procedure on this rank, over all clients.
        model: The server's model.
    """

    def __init__(self, team: Team, rounds: ClientRounds, model: nn.Module) -> None:
        super().__init__(team, rounds, model, "the server and the clients see")
        self._rounds = rounds
        self._told_all = not rounds.has_personal_models

    @property
    @override
    def is_void(self) -> bool:
        return self._rounds.is_void

    @override
    def void(self) -> None:
        self._rounds.void()

    @override
    def agree(self, progress: Progress) -> Progress:
        first = super().agree(progress)
        if first.terms is None and not self._told_all:
            self._tell_kept()
        return first

    @override
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        whole = self._answer(step)
        return self._rounds.sums(whole) if self.leads else {}

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        self._use(self._rounds.released_mean(released), self._rounds.terms.rate)

    @override
    def plain(self, step: int) -> None:
        whole = self._answer(step)
        self._rounds.refuse_divergence(whole, step)
        self._use(self._rounds.plain_mean(whole) if self.leads else {}, self._rounds.share(whole))

    @override
    def personal_model(self, client: str) -> nn.Module:
        """Return the model as one client has it; before the run ends, only of the clients that run on this rank.

        Raises:
            KeyError: there is no such client.
            ProcessError: the client runs on another rank, which is named.
        """
        rank = self._rounds.number_of(client) % self._team.size
        if rank != self._team.rank and not self._told_all:
            raise ProcessError(
                f'Client "{client}" runs on rank {rank}, and what it keeps is told to the others when the run ends; ask on '
                "that rank, or after the last step."
            )
        return self._rounds.personal_model(client)

    @override
    def _told(self) -> dict[str, str]:
        return {"another algorithm, weighting or quorum": _ADDRESS.sub("", self._rounds.settings)}

    @override
    def _alike(self) -> dict[str, Any]:
        return self._rounds.server_state()

    @override
    def _use_alike(self, state: dict[str, Any]) -> None:
        self._rounds.restore_server(state)

    def _answer(self, step: int) -> Answer:
        """Return the answers of all ranks' clients as one; the sums on rank 0 only, what clients keep on their own rank."""
        cohort, key = self._draw(step)
        mine = self._rounds.ask(cohort[cohort % self._team.size == self._team.rank].tolist(), key, step)
        shapes = self._shapes_of_total()
        parts = [mine.total[name] if name in mine.total else torch.zeros(like.shape) for name, like in shapes.items()]
        total = self._team.flat([*parts, torch.tensor([mine.weight], dtype=torch.float64)], torch.float64)
        self._team.meet()
        counts = self._team.gather(torch.tensor([mine.answered, mine.nonfinite, mine.refused]))
        self._team.add_up(total)
        answered, nonfinite, refused = map(sum, zip(*counts, strict=True))
        whole = Answer(split(total, shapes), float(total[-1]), answered, nonfinite, refused, mine.kept)
        self._rounds.note(len(cohort), whole)
        self.refused, self.nonfinite = self._rounds.refused, self._rounds.nonfinite
        return whole if self.leads else dataclasses.replace(whole, total={}, weight=0.0)

    def _draw(self, step: int) -> tuple[Tensor, int]:
        """Return the clients that rank 0 drew for a round, shape (any,), and the round's random number."""
        if not self.leads:
            cohort, said = self._team.told(None)
            return cohort, int(said)
        drawn, key = self._rounds.draw(step)
        return self._team.told(torch.tensor(drawn, dtype=torch.int64), str(key))[0], key

    def _shapes_of_total(self) -> dict[str, Tensor]:
        shapes = dict(self._rounds.shapes())
        clipping = self._rounds.terms.clipping
        if clipping is not None and clipping.counted:
            shapes[UNCLIPPED] = torch.zeros((), device=next(iter(shapes.values())).device)
        return shapes

    def _use(self, mean: Tensors, share: float) -> None:
        """Let every rank's server use the mean of rank 0."""
        self._rounds.use(self._team.share(mean, self._rounds.shapes()), share)

    def _tell_kept(self) -> None:
        """Tell every rank what the clients of each keep, so that all have what one process would have."""
        first, kept = self._rounds.kept_at_first, self._rounds.kept
        mine = sorted(kept)
        self._team.meet()
        counts = [count for (count,) in self._team.gather(torch.tensor([len(mine)]))]
        numbers = [torch.empty(count, dtype=torch.int64) for count in counts]
        values = [
            {name: torch.empty((count, *like.shape), dtype=like.dtype) for name, like in first.items()}
            for count in counts
        ]
        numbers[self._team.rank] = torch.tensor(mine, dtype=torch.int64)
        for name, rows in values[self._team.rank].items():
            for row, number in zip(rows, mine, strict=True):
                row.copy_(kept[number][name])
        self._team.meet()
        for rank in range(self._team.size):
            who = self._team.broadcast(numbers[rank], rank).tolist()
            told = {
                name: self._team.broadcast(rows, rank).to(first[name].device) for name, rows in values[rank].items()
            }
            if rank != self._team.rank:
                kept.update({number: {name: told[name][row] for name in told} for row, number in enumerate(who)})
        self._told_all = True
