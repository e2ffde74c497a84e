"""One training shared by the processes of `torchrun`: the work of a step is split, the noise enters once.

Every process ("rank") holds all records and runs the same script. Rank 0 leads: it alone draws batches and noise, charges the
ledger, checks the first step and saves. In a step it tells the others which records were drawn (of a federation, which
clients: `sfumato.learning.distributed_rounds`); each clips and adds up its share, even an empty one; the float64 sums are
added up on rank 0, which releases one noised sum and sends it round; and every rank takes the same step of the optimiser. So
all ranks hold the same model, and it is the one that a single process would have made with the same randomness, up to rounding.

Rank 0's model and optimiser are those that are trained: the other ranks take over their state when the run begins. Only a few
whole numbers, texts and tensors travel, in the same order on every rank. Before anything large moves, the ranks meet: each
says whether it failed, so that all stop at the same place, and with a reason. This is the only file that knows
`torch.distributed`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from typing_extensions import override

from sfumato._version import __version__
from sfumato.errors import ProcessError, SfumatoError, UnsupportedModelError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import MAX_UNITS, UNCLIPPED
from sfumato.gradients.support import trainable
from sfumato.learning.central import Central
from sfumato.learning.procedure import Procedure, Progress
from sfumato.learning.terms import Terms
from sfumato.privacy.bounded import Bounded, Released

_SPENT = "What was charged, if anything, stays spent."


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[Team | None]:
    """Yield the processes of `torch.distributed` that share the training of a model; None if this one is alone.

    What fails in the block fails on every rank.

    Raises:
        ProcessError: the processes cannot reach one another as they were started.
    """
    if not processes() > 1:
        yield None
        return
    team = Team(_device(model))
    with team:
        yield team


def refuse(what: str) -> None:
    """Refuse to do `what`, a plural, in more than one process.

    Raises:
        ProcessError: there are more.
    """
    if processes() > 1:
        raise ProcessError(
            f"{what} run in one process, and torch.distributed has {processes()}. Fix: start the script with plain python."
        )


def processes() -> int:
    """Return how many processes share this run.

    Raises:
        ProcessError: `torchrun` started several and they were not connected, so each would train and pay for itself.
    """
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    launched = os.environ.get("WORLD_SIZE", "1")
    if dist.is_torchelastic_launched() and launched != "1":
        raise ProcessError(
            f"torchrun started {launched} processes that are not connected, so each would train and pay for itself. Fix: "
            'call torch.distributed.init_process_group("gloo") (on CUDA: "nccl") first, or use plain python.'
        )
    return 1


@final
class Team:
    """The ranks of one run, and how they talk. As a context, it tells the others what failed in it.

    All ranks must call the same methods in the same order. A rank that fails says so at its next `meet`, where the others
    come sooner or later; so nothing may fail between a meeting and the tensors that follow it.

    Args:
        device: Where tensors must lie to travel.

    Attributes:
        rank: Of this process, 0..size-1.
        size: Number of ranks.
        failed: Whether something failed on a rank since this was last set to False; the same on every rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self.failed = False
        self._known: ProcessError | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def meet(self, said: str = "", *, failed: bool = False) -> str:
        """Wait for all ranks and return what rank 0 said; what the others said is not heard.

        Args:
            said: What this rank has to say.
            failed: Whether it failed, and `said` is why.

        Raises:
            ProcessError: another rank failed, which is named, or was lost.
        """
        text = said.encode()
        states = self.gather(torch.tensor([failed, len(text)]))
        broken = [rank for rank, (flag, _) in enumerate(states) if flag]
        speaker = broken[0] if broken else 0
        answer = self.send(text, states[speaker][1], speaker).decode()
        if broken and not failed:
            raise self._remember(ProcessError(f"Rank {speaker} of {self.size} stopped: {answer} {_SPENT}"))
        return answer

    def gather(self, own: Tensor) -> list[list[int]]:
        """Return the whole numbers of every rank, by rank."""
        own = own.to(self._device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with self._connected():
            dist.all_gather(rows, own)
            return [row.tolist() for row in rows]

    def send(self, data: bytes, size: int, speaker: int = 0) -> bytes:
        """Return the `size` bytes of rank `speaker`; what the others give is not heard."""
        own = data if self.rank == speaker else bytes(size)
        # An empty buffer has no address to be read from.
        heard = self.broadcast(torch.frombuffer(bytearray(own), dtype=torch.uint8), speaker) if size else torch.empty(0)
        return heard.cpu().numpy().tobytes()

    def broadcast(self, tensor: Tensor, speaker: int = 0) -> Tensor:
        """Return the tensor of rank `speaker`; that of the others, of the same shape and dtype, is used up."""
        tensor = tensor.to(self._device).contiguous()
        if tensor.numel():
            with self._connected():
                dist.broadcast(tensor, speaker)
        return tensor

    def told(self, drawn: Tensor | None, said: str = "") -> tuple[Tensor, str]:
        """Return the whole numbers (any,) int64 that rank 0 drew, and what it says of them; the other ranks give None.

        Raises:
            ProcessError: as `meet`.
        """
        count, _, heard = self.meet("" if drawn is None else f"{len(drawn)} {said}").partition(" ")
        own = torch.empty(int(count), dtype=torch.int64) if drawn is None else drawn
        return self.broadcast(own).cpu(), heard

    def share(self, values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the named tensors of rank 0, in the shapes and on the devices of `like`, all in the widest of its dtypes.

        Args:
            values: By the names of `like`, or nothing; what the other ranks give is not heard.
            like: On every rank.

        Raises:
            ProcessError: as `meet`.
        """
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in like.values()))
        if self.leads and values:
            vector = self.flat([values[name] for name in like], dtype)
        else:
            vector = torch.empty(sum(value.numel() for value in like.values()), dtype=dtype)
        return split(self.broadcast(vector), like) if self.meet("some" if values else "") else {}

    def add_up(self, tensor: Tensor) -> None:
        """Add the tensors of all ranks up, into that of rank 0; the others' are used up."""
        with self._connected():
            dist.reduce(tensor, 0)

    def flat(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return all coordinates of `parts` in one vector that can travel."""
        return torch.cat([part.detach().reshape(-1).to(self._device, dtype) for part in parts])

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # Its first sentence, without the place in the library's own source.
            said = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
            raise self._remember(
                ProcessError(
                    f"Rank {self.rank} of {self.size} lost touch with the others ({said}). {_SPENT} "
                    "Fix: see which process ended first, and why; a run with a checkpoint can be resumed."
                )
            ) from None

    def _remember(self, error: ProcessError) -> ProcessError:
        self._known = error
        return error

    def __enter__(self) -> None:
        self._known = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An interrupt ends this process, which the others notice; waiting for them would only hold it up.
        if not isinstance(error, Exception) or isinstance(error, StopIteration):
            return
        self.failed = True
        if error is self._known:
            return
        # The text of an error that is not sfumato's may hold values of the records.
        why = str(error) if isinstance(error, SfumatoError) else f"{type(error).__name__}; its own output tells more."
        # Whoever cannot be told has gone already, and this rank's own error is the one to raise.
        with contextlib.suppress(ProcessError):
            self.meet(why, failed=True)


class SharedProcedure(Procedure):
    """A procedure on every rank of a team, whose model and server's state are alike on all.

    Args:
        team: The ranks.
        own: The procedure on this rank.
        model: The model it trains.
        trust: What the processes that share the run see.
    """

    def __init__(self, team: Team, own: Procedure, model: nn.Module, trust: str) -> None:
        self._team, self._own, self._model = team, own, model
        self.leads = team.leads
        self.aggregation = own.aggregation
        seen = f"The processes that share the run, and the network between them, which see what {trust}."
        self.not_covered = (*own.not_covered, seen)

    @property
    @override
    def kind(self) -> str:
        return self._own.kind  # so that any number of processes can go on with a run

    @override
    def start(self, fingerprint: str) -> None:
        own = {
            "another version of sfumato": __version__,
            "another plan": fingerprint,
            "another model": _layout(self._model),
            **self._told(),
            "other records": self._own.data_digest(),
        }
        first = json.loads(self._team.meet(json.dumps(own)))
        for what, value in own.items():
            if first.get(what) != value:
                raise ProcessError(
                    f"Rank {self._team.rank} has {what} than rank 0; run the same script on the same records, in the same "
                    "order, in every process."
                )
        self._team.meet()
        self._take_over()
        self._team.meet()

    @override
    def together(self) -> contextlib.AbstractContextManager[object]:
        return self._team

    @override
    def agree(self, progress: Progress) -> Progress:
        first = Progress(*json.loads(self._team.meet(json.dumps(progress))))
        if self._team.failed:  # and whoever catches that may go on, but not with a rank that missed a step
            self._take_over()
            self._team.failed = False
        return first

    @override
    def use_terms(self, terms: Terms) -> None:
        self._own.use_terms(terms)

    @override
    def shapes(self) -> Mapping[str, Tensor] | None:
        return self._own.shapes()

    @override
    def asked(self, step: int) -> int:
        return self._own.asked(step)

    @override
    def probe(self) -> Bounded | None:
        return self._own.probe()

    @override
    def skip(self) -> None:
        self._own.skip()

    @override
    def data_digest(self) -> str:
        return self._own.data_digest()

    @override
    def state(self) -> dict[str, Any]:
        return self._own.state()

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._own.restore(state)

    def _told(self) -> dict[str, str]:
        """Return what else must be alike on all ranks: what to call a difference, and a text to compare."""
        return {}

    @abstractmethod
    def _alike(self) -> dict[str, Any]:
        """Return the state besides the model that every rank takes over from rank 0."""

    @abstractmethod
    def _use_alike(self, state: dict[str, Any]) -> None:
        """Take over what `_alike` returned on rank 0."""

    def _take_over(self) -> None:
        """Take over the state of rank 0's model, optimiser and sampler."""
        saved = b""
        if self.leads:
            buffer = io.BytesIO()
            torch.save({"model": self._model.state_dict(), "procedure": self._alike()}, buffer)
            saved = buffer.getvalue()
        count = int(self._team.meet(str(len(saved))))
        heard = self._team.send(saved, count)
        if self.leads:
            return
        try:
            state = torch.load(io.BytesIO(heard), weights_only=True, map_location="cpu")
            self._model.load_state_dict(state["model"])
            self._use_alike(state["procedure"])
        except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise ProcessError(
                f"Rank {self._team.rank} cannot take over the model and the optimiser of rank 0 "
                f"({str(error).partition(chr(10))[0]}); make both in the same way in every process, with plain Python "
                "numbers for the optimiser's settings."
            ) from error


@final
class Shared(SharedProcedure):
    """One curator's procedure, its batches split among the ranks of a team.

    **Guarantee**: as the procedure that is shared. The sum that is released holds each drawn record's clipped part once,
    and the noise of one release; it is made on rank 0 by the code that a single process runs.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | fewer drawn records than ranks, or none | a rank without records adds zero and takes part in the step |
    | ranks with other records, plans, models or versions | refused on every rank before anything is charged |
    | a rank fails | all ranks stop, at the latest before the next step, and name it; a next step is for all again |
    | a rank is killed | the others stop with torch.distributed's reason, when it notices or its timeout is over |
    | a rank leaves its loop | the others wait for it until the timeout of the process group |
    | random layers (dropout) | each rank draws its own masks; ranks whose torch seeds are equal draw equal ones |
    | a model with batch statistics (plain training only) | refused: a share has other statistics than the batch |

    Args:
        team: The ranks.
        central: The procedure on this rank, over all records.
        model: The model it trains.

    Raises:
        UnsupportedModelError: names the module that needs the whole batch.
    """

    def __init__(self, team: Team, central: Central, model: nn.Module) -> None:
        _refuse_batch_statistics(model)
        super().__init__(team, central, model, "the curator sees")
        self._central = central

    @override
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        mine = self._central.sum(self._draw(step)[self._team.rank :: self._team.size])
        count = torch.tensor([mine.nonfinite])
        total = self._team.flat([*mine.bounded.value.values(), count], torch.float64)
        self._team.meet()
        self._team.add_up(total)
        if not self.leads:
            return {}
        summed = split(total, trainable(self._model))
        if UNCLIPPED in mine.bounded.value:
            summed[UNCLIPPED] = total[-2]  # after the parameters, before the count
        return {"all": ClippedSum(Bounded(summed, mine.bounded.norm_bound), int(total[-1]))}

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        parameters = trainable(self._model)
        self._central.use(self._team.share(released["all"].value if self.leads else {}, parameters))

    @override
    def plain(self, step: int) -> None:
        indices = self._draw(step)
        if not len(indices):
            return
        mine = indices[self._team.rank :: self._team.size]
        self._central.backward(mine, len(mine) / len(indices))
        parameters = trainable(self._model)
        gradients = [_dense(parameter) for parameter in parameters.values()]
        reached = torch.tensor([parameter.grad is not None for parameter in parameters.values()])
        total = self._team.flat([*gradients, reached], torch.float64)
        self._team.meet()
        self._team.add_up(total)
        total = self._team.broadcast(total)
        whole = split(total, parameters)
        # A parameter that no record reaches has no gradient, so that the optimiser leaves it alone, as in one process.
        for (name, parameter), flag in zip(parameters.items(), total[-len(reached) :].tolist(), strict=True):
            parameter.grad = whole[name].to(parameter.device, parameter.dtype) if flag else None
        self._central.advance()

    @override
    def _alike(self) -> dict[str, Any]:
        return self._central.state()

    @override
    def _use_alike(self, state: dict[str, Any]) -> None:
        self._central.restore(state)

    def _draw(self, step: int) -> Tensor:
        """Return the records that rank 0 drew for a step, shape (any,)."""
        drawn = self._central.draw(step) if self.leads else None
        if drawn is not None and len(drawn) > MAX_UNITS:
            raise UnsupportedModelError(f"A batch may hold at most {MAX_UNITS} records; lower the batch size.")
        return self._team.told(drawn)[0]


def split(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts at the beginning of what `Team.flat` made, by the names, in the shapes and on the devices of `like`."""
    parts, start = {}, 0
    for name, value in like.items():
        parts[name] = vector[start : start + value.numel()].view(value.shape).to(value.device)
        start += value.numel()
    return parts


def _device(model: nn.Module) -> torch.device:
    """Return where tensors must lie to travel: with the model if its backend can take them from there."""
    own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    if own.type in backends and (own.type == "cpu" or backends[own.type] != "gloo"):
        return own
    if "cpu" in backends:
        return torch.device("cpu")
    raise ProcessError(
        f"The process group ({dist.get_backend_config()}) cannot move tensors of a model on {own.type}. Fix: move the model, "
        'or use torch.distributed.init_process_group("gloo").'
    )


def _layout(model: nn.Module) -> str:
    """Return a digest that is the same for models with the same parameters and buffers, whatever their values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
    text = repr((type(model).__qualname__, shapes, list(trainable(model))))
    return hashlib.sha256(text.encode()).hexdigest()


def _dense(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        whole = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        if whole or (isinstance(module, _InstanceNorm) and module.training and module.track_running_stats):
            raise UnsupportedModelError(
                f'Module "{name or "(the model itself)"}" is {type(module).__name__}, which averages over the batch, and '
                "the batch is split among processes; use torch.nn.GroupNorm in its place, or one process."
            )
