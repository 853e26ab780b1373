"""Fills statistics from forward passes: hooks, gradient edges, the output gradients of the likelihood."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from kfac_opt._capture.backward import OutputGraph
from kfac_opt._capture.hooks import WeakHook, active_calls, is_transformed
from kfac_opt._capture.outputs import pick_logits
from kfac_opt._capture.passes import Missed, Pass, Pending, Seen
from kfac_opt._capture.proof import Evidence, verdicts
from kfac_opt._capture.repeatable import RepeatableGraph
from kfac_opt._capture.rounding import Rounding
from kfac_opt._capture.stance import hold_eager, release_eager
from kfac_opt._capture.taps import accumulators
from kfac_opt._capture.watch import LossWatch
from kfac_opt._curvature.block import Call, CurvatureBlock, State, Statistics
from kfac_opt._curvature.edges import output_edge
from kfac_opt._curvature.grouping import all_different, group_rows
from kfac_opt._curvature.precision import full_precision
from kfac_opt.layers import has_own_forward
from kfac_opt.layers.embedding import EmbeddingAdapter
from kfac_opt.likelihoods import Likelihood, output_gradients

LOOKS_BEHIND = 8  # passes whose inputs carry a graph, until it is taken to be another model's

FisherKind = Literal["mc", "exact", "empirical"]
Foreign = Literal["forward", "uses", "tensors", "hidden"]
"""Why a layer is not the map of its adapter: a forward of its own, other uses of its weight, tensors without rows, calls that
hooks do not see."""


class Tracked(Protocol):
    """One block and the parameters it belongs to; ``module`` is None for a parameter of its own."""

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> CurvatureBlock: ...
    @property
    def weight(self) -> nn.Parameter: ...
    @property
    def bias(self) -> nn.Parameter | None: ...
    @property
    def module(self) -> nn.Module | None: ...


class Collector:
    """Attaches to the modules for the passes that are due and detaches again.

    For the true Fisher, whose output gradients come from the likelihood; the empirical one waits for the user's backward
    (``empirical``).

    Args:
        root: the module whose forward is one pass.
        likelihood, fisher, label_samples, outputs, loss_reduction: as in the optimizer.
        make_generator: a private generator for this pass on the given device.
        process_group: over which gradients are averaged and sums are added.
    """

    def __init__(
        self,
        root: nn.Module,
        likelihood: Likelihood,
        fisher: FisherKind,
        label_samples: int,
        outputs: Callable[[Any], Any] | None,
        loss_reduction: Literal["mean", "sum"],
        make_generator: Callable[[int, torch.device], torch.Generator],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.root, self.likelihood, self.fisher, self.label_samples = root, likelihood, fisher, label_samples
        self.outputs, self.loss_reduction, self.make_generator = outputs, loss_reduction, make_generator
        self.process_group = process_group
        self.pending = Pending()
        self.forward_seen = False
        self.paused = False
        self.dropped = 0
        self.missed: set[Missed] = set()  # why passes since the last step do not count
        self.mask: Tensor | None = None
        self.any_mode = False  # whether passes in evaluation mode count as well
        self.sample_ranks = 1  # ranks among which the passes of a step are divided
        self.hidden: set[str] = set()  # layers that ran with gradients disabled inside a pass with gradients
        self.fired: set[str] = set()  # layers whose hook ever ran
        self.proven: set[str] = set()  # layers that are what their adapter says
        self.foreign: dict[str, Foreign] = {}  # those that are not, and why
        self._told: set[str] = set()  # proven since the last step
        self._unproven: set[str] = set()
        self._due: Mapping[str, Tracked] = {}
        self._states: Mapping[str, State | None] = {}
        self._running = _Running()
        self._pass_index = 0
        self._said_grouping = False
        self.rounding = Rounding()
        self._left_behind = 0 if fisher == "empirical" else LOOKS_BEHIND  # whose gradients come through all calls at once
        self._watch = LossWatch(likelihood, outputs)
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _let_go, id(self), self._handles)

    # -- attaching ----------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self, due: Mapping[str, Tracked], states: Mapping[str, State | None]) -> None:
        """Hooks the layers that are due. ``states``: bases in force, or None where examples wait for a new one."""
        self.detach()
        self._due, self._states = due, states
        self._unproven = {name for name, tracked in due.items() if name not in self.proven and _provable(tracked)}
        for name, tracked in due.items():
            if tracked.module is not None:  # before the root's: a model that is itself a layer
                # In front of the user's hooks, which may replace the output.
                hook = WeakHook(self, "on_layer", name)
                self._handles.append(tracked.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._handles.append(self.root.register_forward_pre_hook(WeakHook(self, "on_root_start"), with_kwargs=True))
        end = WeakHook(self, "on_root_end")
        self._handles.append(self.root.register_forward_hook(end, with_kwargs=True, always_call=True))
        hold_eager(id(self))

    def detach(self) -> None:
        _let_go(id(self), self._handles)
        self._running = _Running()

    # -- a pass -------------------------------------------------------------------------------------------------

    def on_root_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = self._running
        running.depth += 1
        if running.depth > 1:
            running.depth = min(running.depth, max(1, active_calls(module)))  # an interrupt may have left the call before
        if running.depth > 1 and running.current is not None:
            return
        running.depth = 1
        self.forward_seen = True
        if torch._C._current_graph_task_id() == -1:  # not while a checkpoint recomputes the model: gradients still come
            self._settle()
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel copies the model at every forward, and its hooks see only a part of the batch. Use "
                "torch.nn.parallel.DistributedDataParallel (one process per device) or a single device."
            )
        reason = self._why_not(module)
        if reason is not None:
            self.missed.add(reason)
        if reason is None:
            self._look_behind((args, kwargs))
        running.current = Pass(num_inputs=_leading_dim([*args, *kwargs.values()])) if reason is None else None

    def _look_behind(self, inputs: Any) -> None:
        """Says once that a pass depends on the parameters through its inputs: through the passes before it."""
        if self._left_behind == 0:
            return
        leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        if not leaves:
            return
        self._left_behind -= 1
        own = {id(parameter) for parameter in self.root.parameters()}
        if any(id(leaf) in own for _, _, leaf in accumulators(cast(Node, leaf.grad_fn) for leaf in leaves)):
            self._left_behind = 0
            warnings.warn(
                "the input of the model carries a graph that leads to the model's own parameters (a state or an output of an "
                "earlier call). The Fisher matrix takes each call for a pass of its own, and layers whose outputs depend on "
                "earlier calls get less curvature than they have, or diagonal blocks. Put the loop over the calls into the "
                "forward of one module and build the optimizer with that, or detach() what is carried.",
                stacklevel=2,
            )

    def _why_not(self, module: nn.Module) -> Missed | None:
        """Why a pass that begins now does not count, or None."""
        if self.paused:
            return "paused"
        if is_transformed():
            return "transformed"
        if not torch.is_grad_enabled():
            return "no gradients"
        return None if module.training or self.any_mode else "evaluation"

    def on_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        current = self._running.current
        if current is None or name in self.foreign:
            return
        if not torch.is_grad_enabled():
            self.hidden.add(name)
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(out, Tensor) or not isinstance(x, Tensor) or not out.requires_grad:
            return
        if _irregular(x) or _irregular(out):
            self._refuse(current, name, "tensors")
            return
        block = self._due[name].block
        assert block.adapter is not None
        if out.numel() == 0 or x.numel() == 0:
            self.fired.add(name)
            return  # no rows
        groups, batch, shared, out_dim = block.adapter.output_rows(out.detach()).shape
        if (groups, out_dim) != block.layout.shape[:2]:
            return  # a subclass that returns something else than its linear map: as if it had not run
        self.fired.add(name)
        edge, view = output_edge(out, x)
        call = Call(x.detach(), (batch, shared), view)
        current.calls.setdefault(name, []).append(call)
        current.edges.setdefault(name, []).append(edge)
        self._on_call(current, name, edge)
        if name in self._unproven:
            current.inputs.setdefault(name, []).append(Seen.of(x))
            if has_own_forward(module):
                current.held.add(name)
        if self.outputs is None and self.mask is None and block.sharing == "expand" and name not in current.held:
            # No mask can come and each row counts by itself: take the moment now, so that checkpointing can free the input.
            self._take_input(current, name, call)

    def _take_input(self, current: Pass, name: str, call: Call) -> None:
        block = self._due[name].block
        statistics = current.statistics.setdefault(name, Statistics())
        call.taken = True
        with torch.no_grad(), full_precision(call.x.device):
            block.add_input(statistics, call)
        statistics.num_rows += call.num_examples() if block.sharing == "reduce" else call.num_rows()
        if not block.needs_input:
            call.x = call.x.new_empty(0)

    def _take_inputs(self, current: Pass) -> None:
        """Those that had to wait for the mask, and with one for the rows that gradients reach."""
        for name in [name for name in current.calls if name in self._due and name not in current.held]:
            for call in current.calls[name]:
                if not call.taken and not (current.masked and call.keep is None):  # no gradient came to that call at all
                    self._take_input(current, name, call)

    def on_root_end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running = self._running
        running.depth -= 1
        if running.depth > 0:
            return
        current, running.current = running.current, None  # disarmed: recomputed layers must not count twice
        if current is None or (output is None and sys.exc_info()[0] is not None):
            return  # the forward raised: no pass
        logits, mask = pick_logits(output, self.outputs)
        mask = self.mask if mask is None else mask
        self.likelihood.check(logits)
        if not logits.requires_grad:
            self.missed.add("detached")
            return
        if mask is not None:
            self.likelihood.term_mask(logits, mask)
        current.num_terms = self.likelihood.num_terms(logits, mask)
        if current.num_terms == 0:
            self.missed.add("masked")
            return
        if not self.likelihood.admits(logits, mask):
            self._drop()
            return
        current.masked = mask is not None and not bool(mask.all())
        self._group_rows(current, logits.shape[0])
        if not current.masked:
            self._take_inputs(current)
        self._collect(current, logits, mask)
        self._watch.attach(logits, mask, output)  # now: hooks are to see the gradients of the loss alone

    def _own_parameters(self, name: str) -> list[nn.Parameter | None]:
        """Weight and bias of a layer's block, None for one that is frozen."""
        tracked = self._due[name]
        return [p if p is not None and p.requires_grad else None for p in (tracked.weight, tracked.bias)]

    def _to_prove(self, current: Pass) -> list[str]:
        """Layers of this pass whose weight's gradient is to be held against what the hook saw."""
        return [name for name in current.edges if name in current.inputs and self._due[name].weight.requires_grad]

    def _note(self, evidence: dict[str, Evidence], current: Pass, name: str, gradients: list[Tensor | None]) -> None:
        """Inputs and output gradients of a layer that has to be proven."""
        if name not in current.inputs:
            return
        adapter = self._due[name].block.adapter
        assert adapter is not None
        seen = evidence[name] = Evidence(adapter)
        for call, x, gradient in zip(current.calls[name], current.inputs.pop(name), gradients):
            if gradient is not None:
                seen.unusable |= not x.unchanged
                seen.add(x.x, call.output_gradient(gradient))

    def _judge(self, current: Pass, evidence: dict[str, Evidence], gradients: Mapping[str, list[Tensor | None]]) -> None:
        """Layers that are none of their adapters' maps leave the pass; the others' inputs are taken if they waited."""
        for name, right in verdicts(evidence, gradients).items():
            if right:
                self._told.add(name)
            else:
                own = name in current.held
                self._refuse(current, name, "forward" if own else "uses")
        for name in current.held & current.calls.keys() & self._due.keys():
            for call in [] if current.masked else current.calls[name]:
                self._take_input(current, name, call)
        current.held.clear()

    def _refuse(self, current: Pass, name: str, reason: Foreign) -> None:
        """The layer is none of its adapter's maps: its block goes at the next step."""
        self.foreign[name] = reason
        for part in (current.calls, current.edges, current.gradients, current.statistics, current.inputs):
            part.pop(name, None)  # type: ignore[attr-defined]

    def _group_rows(self, current: Pass, num_examples: int) -> None:
        """Which rows belong to one example; says once where a sum over examples needs it and it cannot be known."""
        unknown = group_rows(current.calls, num_examples, current.num_inputs)
        names = [name for name in unknown if self._due[name].block.per_example and not self._reads_once(current, name)]
        if names and not self._said_grouping:
            self._said_grouping = True
            warnings.warn(
                f"the leading dimension of what {', '.join(map(repr, names))} gets ({unknown[names[0]]}) is no multiple of the "
                f"{num_examples} examples of the model's outputs, so that it is not known which rows belong to one example: each "
                "entry of it is taken for an example of its own (right for packed rows that do not meet in one loss term). If "
                "examples have several rows there, keep the batch in front, or use curvature='kronecker' and "
                "weight_sharing='expand', whose factors need no examples.",
                stacklevel=2,
            )

    def _reads_once(self, current: Pass, name: str) -> bool:
        """A table of positions, say, whose rows do not meet."""
        adapter = self._due[name].block.adapter
        return isinstance(adapter, EmbeddingAdapter) and all(all_different(call.x) for call in current.calls[name])

    def _on_call(self, current: Pass, name: str, edge: GradientEdge) -> None:
        """A layer was called; its output is at ``edge``."""

    def _collect(self, current: Pass, logits: Tensor, mask: Tensor | None) -> None:
        """Output gradients of the likelihood, back to the layers' outputs only, into sums."""
        generator = self.make_generator(self._pass_index, logits.device)
        self._pass_index += 1
        # A parameter may have been frozen since the blocks were made.
        alone = [t for t in self._due.values() if t.module is None and t.weight.requires_grad]
        if not current.edges and not alone:
            self.pending.num_terms += current.num_terms  # terms there are: their layers have to be looked for elsewhere
            return
        columns = output_gradients(
            self.likelihood,
            logits,
            kind=cast(Literal["mc", "exact"], self.fisher),
            num_labels=self.label_samples,
            mask=mask,
            generator=generator,
        )
        with full_precision(logits.device):
            columns = self._look_for_rounding(current, logits, columns, alone)
            for column in columns:
                self._take_column(current, logits, column, alone)
        current.graph = None
        if current.masked:
            self._take_inputs(current)
        if self._finite(current):
            self.pending.num_terms += current.num_terms
            self._keep(current)

    def _look_for_rounding(
        self, current: Pass, logits: Tensor, columns: Iterator[Tensor], alone: list[Tracked]
    ) -> Iterator[Tensor]:
        """Finds blocks whose gradients are rounding, with the first of the columns; gives all of them back."""
        edges = [(name, edge) for name, found in current.edges.items() for edge in found]
        owners = [name for name, _ in edges] + [tracked.name for tracked in alone]
        column = next(columns, None) if self.rounding.due(owners) else None
        if column is None:
            return columns

        graph = self._graph(current, logits, [*(edge for _, edge in edges), *(tracked.weight for tracked in alone)])
        with self._naming_hidden(), graph.untouched():
            self.rounding.look(graph.pull, column, owners)
        return chain([column], columns)

    def _take_column(self, current: Pass, logits: Tensor, column: Tensor, alone: list[Tracked]) -> None:
        """One column of output gradients; the first of a pass also proves layers."""
        owners = [(name, index) for name, edges in current.edges.items() for index in range(len(edges))]
        edges = [current.edges[name][index] for name, index in owners]
        arrived: dict[str, list[Tensor | None]] = {}
        evidence: dict[str, Evidence] = {}
        proving = self._to_prove(current)
        held = set(current.held)

        def receive(number: int, gradient: Tensor) -> None:
            if number >= len(owners):
                found[number - len(owners)] = gradient
                return
            name, index = owners[number]
            gradients = arrived.setdefault(name, [None] * len(current.edges[name]))
            gradients[index] = gradient
            if len(gradients) == 1 and name not in held:  # the calls of one example belong together
                self._note(evidence, current, name, gradients)
                self._add_output(current, name, arrived.pop(name))

        own = {name: self._own_parameters(name) for name in proving}
        targets = [p for members in own.values() for p in members if p is not None]
        parameters = [*(tracked.weight for tracked in alone), *targets]
        if not edges and not parameters:
            return  # the column before has shown that no layer is what it seemed
        found: list[Tensor | None] = [None] * len(parameters)
        graph = self._graph(current, logits, [*edges, *parameters])
        with self._naming_hidden(), graph.untouched():
            graph.pull(column, receive)
        with torch.no_grad():
            for name in {**arrived, **own}:
                self._note(evidence, current, name, arrived.get(name, []))
            if proving or held:
                reached = dict(zip(map(id, targets), found[len(alone) :]))
                proof = {name: [reached.get(id(p)) for p in members] for name, members in own.items()}
                self._judge(current, evidence, proof)
                current.inputs.clear()
            for name, gradients in arrived.items():
                if name in current.calls:
                    self._add_output(current, name, gradients)
            for tracked, gradient in zip(alone, found):
                if gradient is not None:
                    statistics = current.statistics.setdefault(tracked.name, Statistics())
                    tracked.block.add_output(statistics, [], self._without_rounding(tracked.name, [gradient]), None)

    def _without_rounding(self, name: str, gradients: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(gradient) for gradient in gradients] if name in self.rounding.noise else gradients

    def _graph(self, current: Pass, logits: Tensor, targets: list[Any]) -> RepeatableGraph:
        """The graph from the logits to these targets, of which later columns leave some out."""
        if current.graph is None or len(current.graph.graph.edges) != len(targets):
            hidden = {name: self._due[name].weight for name in self.hidden if name in self._due and name not in current.calls}
            current.graph = RepeatableGraph(self.root, OutputGraph(logits, targets), "curvature estimate", hidden)
            current.graph.check()
        return current.graph

    @contextmanager
    def _naming_hidden(self) -> Iterator[None]:
        """Says which layers a reentrant checkpoint hides, where autograd only says that there is one."""
        try:
            yield
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            names = ", ".join(repr(name) for name in sorted(self.hidden)) or "a layer"
            raise RuntimeError(
                f"{names} runs inside a reentrant checkpoint, which hides it from hooks and from autograd.grad. Use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            ) from error

    def _add_output(self, current: Pass, name: str, gradients: list[Tensor | None]) -> None:
        arrivals = zip(current.calls[name], gradients)
        pairs = [(call, call.output_gradient(g.detach())) for call, g in arrivals if g is not None]
        if pairs:
            calls, arrived = [call for call, _ in pairs], self._without_rounding(name, [g for _, g in pairs])
            block = self._due[name].block
            if current.masked and block.adapter is not None:
                for call, gradient in pairs:
                    call.reach(block.adapter.output_rows(gradient))
            block.add_output(current.statistics.setdefault(name, Statistics()), calls, arrived, self._states.get(name))

    def _finite(self, current: Pass) -> bool:
        """One read of the device for all sums of the pass; a pass that is not finite is dropped and counted."""
        parts = current.statistics.values()
        sums = [_probe(name, value) for statistics in parts for name, value in statistics.sums.items()]
        dtype = sums[0].dtype if sums else torch.float32
        sums += [gradient.sum(dtype=dtype) for statistics in parts for _, found, _ in statistics.examples for gradient in found]
        sums += [_square(part.call.x, dtype) for statistics in parts for part in statistics.late]
        if sums and not bool(torch.isfinite(torch.stack([value.to(sums[0].device) for value in sums])).all()):
            self._drop()
            return False
        return True

    def _drop(self) -> None:
        self.dropped += 1
        self.missed.add("dropped")

    def _keep(self, current: Pass) -> None:
        for name, statistics in current.statistics.items():
            if any(key != "input" for key in statistics.sums) or statistics.examples:
                self.pending.statistics.setdefault(name, Statistics()).merge(statistics)

    @property
    def watching(self) -> bool:
        """Whether the loss of these passes is held against the likelihood."""
        return self._watch.waiting

    # -- handing over -------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Turns passes into sums that had to wait for their backward."""

    def _complete(self, pending: Pending) -> None:
        """Brings sums to their scale that is known when the step has all its passes."""

    def count_dropped(self) -> int:
        """Passes dropped so far, those included whose backward has just come."""
        self._settle()
        return self.dropped

    def take(self, *, gradients_came: bool = False) -> Pending:
        """Everything since the last step; starts anew.

        Args:
            gradients_came: whether there was a backward, for what is to be said of the loss.
        """
        self._settle()
        self._watch.settle(gradients_came=gradients_came)
        taken = self.pending
        if taken.open:
            self.missed.add("no backward")
        taken.missed = set(self.missed)
        self._complete(taken)
        self.proven |= self._told - self.foreign.keys()
        self.reset()
        return taken

    def reset(self) -> None:
        """Forgets pending passes."""
        self.pending = Pending()
        self.forward_seen = False
        self._pass_index = 0
        self._told.clear()
        self.missed.clear()
        self.hidden.clear()

    @contextmanager
    def separately(self) -> Any:
        """Collects the body's passes as a step of its own; they are dropped if the body raises."""
        before, self.pending = self.pending, Pending()
        try:
            yield
            self._settle()
            self._complete(self.pending)
            before.merge(self.pending)
        finally:
            self.pending = before


class _Running(threading.local):
    """The pass under way in this thread: another one may validate the model at the same time."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.depth = 0


def _provable(tracked: Tracked) -> bool:
    adapter = tracked.block.adapter
    return tracked.module is not None and adapter is not None and adapter.provable


def _irregular(tensor: Tensor) -> bool:
    """Nested and sparse tensors have no rows to speak of."""
    return tensor.is_nested or tensor.layout != torch.strided


def _leading_dim(arguments: list[Any]) -> int | None:
    dense = [part for part in arguments if isinstance(part, Tensor) and not part.is_nested]
    return next((int(part.shape[0]) for part in dense if part.dim()), None)


def _let_go(holder: int, handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    release_eager(holder)


def _probe(name: str, value: Tensor) -> Tensor:
    """0-dim, finite if ``value`` is: of a sum of outer products the diagonal bounds everything."""
    gram = name in ("input", "output", "moment") and value.dim() == 3
    return value.diagonal(dim1=-2, dim2=-1).sum() if gram else value.sum()


def _square(x: Tensor, dtype: torch.dtype) -> Tensor:
    """0-dim, finite if the second moment of the input ``x`` is; 64 times its trace bounds that of 7 × 7 patches."""
    flat = x.to(dtype).flatten()
    return 64.0 * torch.linalg.vecdot(flat, flat)
