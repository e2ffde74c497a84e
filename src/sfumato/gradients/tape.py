"""One forward of a batch in which records cannot meet, and one backward that stops at the outputs of the layers.

The model runs under `torch.func.vmap`, so it sees one record at a time and nothing in it can mix two of them; torch turns
that into batched kernels. Every call of a torch function that takes a trained parameter is seen here on its way (a
`TorchFunctionMode`, so neither modules nor parameters are touched), and a rule notes what the parameter's gradient is made
of. The backward then asks autograd for the gradients of the layers' outputs alone, so no gradient of a parameter is computed.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from sfumato.errors import SfumatoError, UnsupportedModelError
from sfumato.gradients.clipped import Loss
from sfumato.gradients.support import following, memory_of, name_of, refuse_memories, running
from sfumato.gradients.terms.held import Given
from sfumato.gradients.terms.term import Term, exactly

_functorch = torch._C._functorch

Terms = Callable[[Sequence[Tensor | None]], Iterable[Term]]
"""Maps the gradients of a use's outputs (None: nothing depended on that output) to the terms of its parameters."""


@final
@dataclass(frozen=True)
class Weight:
    """A parameter as a rule sees it, or what was computed from parameters alone (a transpose, a normalised weight).

    Attributes:
        name: Under which its terms are collected.
        value: To compute with. It requires a gradient, so that outputs are on autograd's graph, but leads nowhere else.
    """

    name: str
    value: Tensor


@final
class Kept:
    """A tensor that a rule needs again after the backward; changing it in place meanwhile is noticed.

    Args:
        tensor: Any tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            UnsupportedModelError: it was changed in place.
        """
        if self._tensor._version != self._version:
            raise UnsupportedModelError(
                "The input of a layer was changed in place after the layer had used it; use operations that return a new "
                "tensor (inplace=False)."
            )
        return self._tensor


@final
@dataclass(frozen=True)
class Use:
    """One place where parameters were used.

    Attributes:
        layer: The first parameter that was used, for people.
        operation: The torch function, for people.
        rule: The rule that noted it, for people.
        edges: Where the gradients of the outputs come from.
        in_passing: Whether the backward passes through here on its way to an earlier use.
        number: Its place on the tape.
        weights: The names for which its terms must come.
    """

    layer: str
    operation: str
    rule: str
    edges: tuple[GradientEdge, ...]
    in_passing: bool
    number: int
    weights: frozenset[str]


Rule = Callable[..., Any]
"""See `sfumato.gradients.rules.registry` for the contract."""


@final
class Tape(TorchFunctionMode):
    """Notes the uses of trained parameters during one forward.

    Args:
        parameters: The trained parameters, by name.
        rules: By torch function.
        otherwise: The rule for any other function that takes a trained parameter.
        together: Functions without parameters that are faster on all records at once than as vmap would run them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rules: Mapping[Any, Rule],
        otherwise: Rule,
        together: Mapping[Any, Rule],
    ) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._terms: list[Terms | None] = []
        self._counts: Counter[str] = Counter()
        self._behind: set[int] = set()
        self._sources: dict[str, list[str]] = {}
        self._seen: list[weakref.ref[Tensor]] = []
        self.bytes = self.noted_bytes = 0
        self._parameters, self._rules, self._otherwise, self._together = parameters, rules, otherwise, together
        self._weights = {id(p): Weight(name, p.detach().requires_grad_()) for name, p in parameters.items()}
        # Made outside of vmap, where a leaf may still ask for a gradient.
        device = next(iter(parameters.values())).device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._computed: dict[str, Tensor] = {}
        self._model: nn.Module = nn.Identity()
        self._how = "one record at a time"
        self._loss = ""
        self._level = -1
        self._records = 0
        self._operation = ""
        self._rule: Rule = otherwise  # the one that is at work, and is to blame
        self._followed: list[Rule] = []

    def losses(self, model: nn.Module, loss: Loss, features: Tensor, targets: Tensor, *, views: bool) -> Tensor:
        """Return the loss of every record, shape (records,), and note the uses on the way."""

        def of_one(feature: Tensor, target: Tensor) -> Tensor:
            self._level = _functorch.maybe_get_level(feature)
            if views:
                losses = self._tensor(loss(model(feature), target.expand(len(feature), *target.shape)))
                return losses if losses.dim() == 0 else losses.mean()
            return self._tensor(loss(model(feature.unsqueeze(0)), target.unsqueeze(0))).sum()

        self._records, self._model, self._loss = len(features), model, name_of(loss)
        if views:
            self._how += " on the views that augment returned"
        with running(model, self._how, quote=False), self:
            losses: Tensor = vmap(of_one, randomness="different")(features, targets)
        self._refuse_memories(model, loss)
        return losses

    def _tensor(self, losses: object) -> Tensor:
        if not isinstance(losses, Tensor):
            raise UnsupportedModelError(
                f"The loss ({self._loss}) returned {type(losses).__name__}; it must return a tensor: the mean over the "
                "records, or one number for each."
            )
        return losses

    def _refuse_memories(self, model: nn.Module, loss: Loss) -> None:
        """Refuse a model that keeps a value of the records, which would reach the records that come next."""
        refuse_memories(model, loss)
        if any(seen() is not None for seen in self._seen):
            gc.collect()  # an output object may hold itself
            if any(seen() is not None for seen in self._seen):
                raise UnsupportedModelError(memory_of("Something around the model (a hook, a list, a global variable)"))
        self._seen.clear()

    def backward(self, losses: Tensor, take: Callable[[Use, list[Term]], None]) -> None:
        """Do the backward; give each use with its terms to `take`, as soon as they are known.

        Raises:
            UnsupportedModelError: a parameter reached the loss on a way that was not seen, the loss depends on none at all,
                or a rule did not do what it must.
        """
        if not losses.requires_grad:
            raise self._independent()
        reached = False

        def given(use: Use, gradients: Sequence[Tensor | None]) -> None:
            nonlocal reached
            terms, self._terms[use.number] = self._terms[use.number], None
            if terms is not None and any(gradient is not None for gradient in gradients):
                with torch.no_grad(), exactly(losses.device):
                    with following(use.operation, self._followed[use.number], self._how, self._model):
                        made = list(self._of_parameters(self._checked(use, terms(gradients))))
                    if made:
                        reached = True
                        take(use, made)

        # A use behind which there are others lies on autograd's way to them and is given its gradient in passing, while that
        # is in the cache, and nobody keeps it. The others are what autograd is asked for.
        last = [use for use in self.uses if not use.in_passing]
        hooks = [use.edges[0].node.register_prehook(_taking(use, given)) for use in self.uses if use.in_passing]
        edges = [edge for use in last for edge in use.edges]
        wanted: list[Any] = [*edges, *self._parameters.values()]
        try:
            with running(self._model, self._how, quote=False), torch.enable_grad():
                found: list[Tensor | None] = list(torch.autograd.grad(losses.sum(), wanted, allow_unused=True))
        finally:
            for hook in hooks:
                hook.remove()  # a hook and its node hold each other, and all that the hook knows, until a garbage collection
        for name, unseen in zip(self._parameters, found[len(edges) :], strict=True):
            if unseen is not None:
                raise UnsupportedModelError(
                    f'Parameter "{name}" reaches the loss on a way that cannot be followed, for example a random operation '
                    "on the parameter itself or a compiled function; apply it to the layer's input or output instead."
                )
        passed_by = [use for use in self.uses if use.in_passing and self._terms[use.number] is not None]
        if passed_by and (nodes := _nodes(losses.grad_fn)):
            for use in passed_by:
                if use.edges[0].node in nodes:
                    raise SfumatoError(f"The gradient of {use.operation} was passed by; this is a fault in sfumato.")
        position = 0
        for use in last:
            place = slice(position, position + len(use.edges))
            gradients, found[place] = found[place], [None] * len(use.edges)  # let go of each once its terms are made
            position += len(use.edges)
            given(use, gradients)
        if not reached:
            raise self._independent()

    def _independent(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The loss ({self._loss}) does not depend on any trained parameter of {type(self._model).__name__}, so there would "
            "be noise and nothing else to train on; compute it from the model's output, without detach(), no_grad() or argmax."
        )

    def used_once(self, name: str) -> bool:
        """Tell whether a parameter has been used in one place only, and as it is."""
        return self._counts[name] == 1 and id(self._parameters[name]) not in self._behind

    # For rules.

    @property
    def records(self) -> int:
        """Records in the batch."""
        return self._records

    def has_records(self, value: object) -> bool:
        """Tell whether a value differs by record."""
        return isinstance(value, Tensor) and _functorch.is_batchedtensor(value)

    def can_open(self, value: Tensor) -> bool:
        """Tell whether a value differs by record, and by nothing else, so that `open` takes it."""
        return self.has_records(value) and _functorch.maybe_get_level(value) == self._level

    def open(self, value: Tensor) -> Tensor:
        """Return the values of all records, shape (records, *shape that the model sees)."""
        if _functorch.maybe_get_level(value) != self._level:
            raise UnsupportedModelError(
                f"{self._operation} uses a trained parameter inside a vmap or grad of the model's own, which cannot be "
                "followed; compute it outside of that, or freeze the parameter."
            )
        inner: Tensor = _functorch.get_unwrapped(value)
        return inner.movedim(_functorch.maybe_get_bdim(value), 0)

    def close(self, values: Tensor) -> Tensor:
        """Return all records' values as the model sees them: the reverse of `open`."""
        closed: Tensor = _functorch._add_batch_dim(values, 0, self._level)
        return closed

    def outside(self) -> contextlib.AbstractContextManager[None]:
        """Return a context outside of vmap, for random operations on open tensors: they draw for every record and image."""
        left: contextlib.AbstractContextManager[None] = temporarily_pop_interpreter_stack()
        return left

    def weight(self, value: Tensor | None) -> Weight | None:
        """Return a trained parameter to compute with; None for what is None. What is frozen has an empty name."""
        if value is None:
            return None
        if not value.requires_grad:
            return Weight("", value)
        known = self._weights.get(id(value))
        if known is None:
            name = f".computed {len(self._computed)}"  # no parameter is called that
            self._computed[name] = value
            self._sources[name] = self._names_of(value)
            self._behind.update(id(self._parameters[source]) for source in self._sources[name])
            # The sum with the anchor requires a gradient, and autograd finds nothing behind it.
            known = self._weights[id(value)] = Weight(name, value.detach() + self._anchor.to(value))
        return known

    def note(
        self, rule: str, weights: Sequence[Weight | None], inputs: Sequence[Tensor], outputs: Sequence[Tensor],
        terms: Terms,
    ) -> None:  # fmt: skip
        """Note a use.

        Args:
            rule: Name of the rule.
            weights: Used here.
            inputs: What the outputs depend on besides.
            outputs: All records' outputs, each fresh from its kernel (no view), whose gradients `terms` is given.
            terms: See `Terms`.
        """
        layer = next((weight.name for weight in weights if weight is not None and weight.name), "")
        layer = next(iter(self._sources.get(layer, [])), layer)
        # The place of a view on the graph changes when its base is written to in place (ReLU(inplace=True) does that).
        if any(output._is_view() for output in outputs):
            raise UnsupportedModelError(
                f"The rule for {self._operation} noted an output that is a view; write out = out.clone() before tape.note, "
                "and go on with that."
            )
        edges = tuple(get_gradient_edge(output) for output in outputs)
        size = sum(output.nbytes for output in outputs)
        self.noted_bytes += size
        self.bytes += size
        names = frozenset(weight.name for weight in weights if weight is not None and weight.name)
        self._counts.update(names)
        in_passing = len(edges) == 1 and any(tensor.requires_grad for tensor in inputs)
        self.uses.append(Use(layer, self._operation, rule, edges, in_passing, len(self.uses), names))
        self._terms.append(terms)
        self._followed.append(self._rule)

    # For torch.

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        batched, trained = False, []
        for value in _tensors(args, kwargs):
            if _functorch.is_batchedtensor(value):
                batched = True
            elif value.requires_grad:
                trained.append(value)
                if _functorch.is_functorch_wrapped_tensor(value):
                    raise UnsupportedModelError(
                        "The model uses a trained parameter inside a torch.func transform of its own, which cannot be "
                        "followed; compute it outside of that, or freeze the parameter."
                    )
        self._operation = getattr(func, "__name__", str(func))
        if batched and trained and torch.is_grad_enabled():
            if self._operation in _WRITES or (self._operation[-1:] == "_" and self._operation[-2:] != "__"):
                raise UnsupportedModelError(
                    f"{self._operation} writes a trained parameter into a tensor in place; write it as an operation that "
                    "returns a new tensor."
                )
            result = self._follow(self._rules[func], trained, args, kwargs) if func in self._rules else NotImplemented
            return self._watch(result if result is not NotImplemented else self._otherwise(self, func, args, kwargs))
        if batched and func in self._together:
            result = self._follow(self._together[func], (), args, kwargs)
            if result is not NotImplemented:
                return self._watch(result)
        result = func(*args, **kwargs)
        if batched and isinstance(result, Tensor) and _functorch.is_batchedtensor(result):
            inner = _functorch.get_unwrapped(result)
            self.bytes += 0 if inner._is_view() else inner.nbytes
        return self._watch(result)

    def _follow(self, rule: Rule, trained: Iterable[Tensor], args: Any, kwargs: Any) -> Any:
        """Return what a rule returns, once it has noted the trained parameters that it was given."""
        operation, begun, before = self._operation, len(self.uses), self._rule
        self._rule = rule
        try:
            with following(operation, rule, self._how, self._model):
                result = rule(self, *args, **kwargs)
        finally:
            self._rule = before
        if result is NotImplemented:
            return result
        noted = {source for use in self.uses[begun:] for name in use.weights for source in self._behind_name(name)}
        for value in trained:
            for name in self._names_of(value):
                if name not in noted:
                    raise UnsupportedModelError(
                        f'The rule for {operation} was given the parameter "{name}" and noted nothing for it, so it would not '
                        "be trained; call tape.note with tape.weight(...) of it, or return NotImplemented."
                    )
        return result

    def _names_of(self, value: Tensor) -> list[str]:
        """Return the parameters that a value is, or was computed from; none if they are not the model's."""
        known = self._weights.get(id(value))
        if known is not None:
            return self._behind_name(known.name)
        behind = _leaves(value)
        return [name for name, parameter in self._parameters.items() if id(parameter) in behind]

    def _behind_name(self, name: str) -> list[str]:
        """Return the parameters behind a name that terms are collected under."""
        return self._sources.get(name, [name])

    def _watch(self, result: Any) -> Any:
        """Remember what was handed to the model, weakly, so that it shows if somebody keeps it."""
        for value in _tensors((result,), {}):
            if _functorch.is_batchedtensor(value):
                self._seen.append(weakref.ref(value))
        return result

    def _checked(self, use: Use, terms: Iterable[Term]) -> Iterator[Term]:
        """Pass on the terms of a use, if they are those that its rule promised."""
        missing = set(use.weights)
        for term in terms:
            if not isinstance(term, Term):
                raise UnsupportedModelError(
                    f"The rule for {use.operation} gave {type(term).__name__} in place of a term; yield Given(name, gradients)."
                )
            value = self._computed.get(term.name, self._parameters.get(term.name))
            if value is None:
                raise UnsupportedModelError(
                    f'The rule for {use.operation} gave a term for "{term.name}", which is no trained parameter; leave out '
                    "weights whose name is empty."
                )
            wrong = isinstance(term, Given) and term.per_record().shape[1:] != value.shape
            if wrong or term.records != self._records:
                raise UnsupportedModelError(
                    f'The rule for {use.operation} gave a term of the wrong shape for "{use.layer}"; a gradient has the shape '
                    f"(records, {', '.join(map(str, value.shape))})."
                )
            missing.discard(term.name)
            yield term
        for name in sorted(missing):
            raise UnsupportedModelError(
                f'The rule for {use.operation} noted "{self._behind_name(name)[0]}" and gave no term for it, so it would not '
                "be trained; yield one term or more for each weight whose name is not empty."
            )

    def _of_parameters(self, terms: Iterable[Term]) -> Iterator[Term]:
        """Carry terms of what was computed from parameters back to the parameters."""
        for term in terms:
            if term.name not in self._computed:
                yield term
                continue
            if not self._sources[term.name]:
                continue  # not the model's, so nobody trains it: a parameter of the loss
            pulled = torch.autograd.grad(
                self._computed[term.name],
                [self._parameters[name] for name in self._sources[term.name]],
                term.per_record(),
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            for name, gradient in zip(self._sources[term.name], pulled, strict=True):
                if gradient is not None:
                    yield Given(name, gradient)


_WRITES = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__"})


def _tensors(args: Iterable[object], kwargs: Mapping[str, object]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value, {})
        elif isinstance(value, dict):
            yield from _tensors((), value)


def _taking(
    use: Use, given: Callable[[Use, Sequence[Tensor | None]], None]
) -> Callable[[tuple[Tensor | None, ...]], None]:  # fmt: skip
    return lambda gradients: given(use, [gradients[use.edges[0].output_nr]])


def _leaves(value: Tensor) -> set[int]:
    """Return the ids of the tensors that a value was computed from."""
    return {id(node.variable) for node in _nodes(value.grad_fn) if hasattr(node, "variable")}


def _nodes(start: Node | None) -> set[Node]:
    """Return all nodes of autograd's graph that a backward from `start` can reach."""
    waiting, seen = [start], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    return seen
