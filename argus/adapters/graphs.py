"""Decode steps as CUDA graphs: a step of one token is recorded once and replayed.

A step's kernels read pages where tables on the device say that they lie; all else that changes from step to step is the token,
its position, and its place in the window, which kernels find there too. Launching them one by one from Python takes longer than
they take.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from argus.engine import Held, LayerCache
from argus.errors import NotCompiledError
from argus.window import Place

LOG = logging.getLogger(__name__)
GIVEN = frozenset({"input_ids", "position_ids", "past_key_values", "use_cache"})
"""What a recorded step is given."""
LEFT_OUT = frozenset({"attention_mask", "cache_position"})
"""What it is not given: queries know their positions, and masks that hide tokens have places of their own."""
ROOM = 128
"""Tokens that masks have room for, at least, beyond those that come before pages move."""
CAPTURING = "output_capturing_hook"
"""Name of the hooks that transformers leaves in a model which was once asked for hidden states."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile: a graph among it cannot be freed while another is recorded, and would spoil that one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture(call: Callable[[], Any], stream: Any = None, beside: Any = None) -> tuple[Any, Any]:
    """A CUDA graph of the kernels that `call` launches, and what it returned.

    ``torch.cuda.graph`` would empty PyTorch's cache of memory each time.

    Parameters
    ----------
    call : callable
        Must only launch kernels that ran before, and not wait for them.
    stream : torch.cuda.Stream or None
        Where it is recorded.
    beside : torch.cuda.CUDAGraph or None
        One with whose memory it is to make do, as long as never both are replayed at once.
    """
    graph, stream, current = torch.cuda.CUDAGraph(), stream or torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    memory = {} if beside is None else {"pool": beside.pool()}
    with uncollected(), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local", **memory)
        try:
            made = call()
        except BaseException:
            # A capture must end before what went wrong is told, and ending this one may go wrong too.
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph, made


def copied(outputs: Any) -> Any:
    """A model's output with copies of its tensors, those in tuples too, which the next replay overwrites."""
    return type(outputs)(**{name: _copy(x) for name, x in outputs.items()})


def _copy(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    return tuple(map(_copy, x)) if type(x) is tuple else x


def options(given: dict[str, Any]) -> dict[str, Any]:
    """What else is asked of a step."""
    return {name: x for name, x in given.items() if name not in GIVEN | LEFT_OUT and x is not None and x is not False}


def plain_step(model: Any, given: dict[str, Any]) -> bool:
    """Whether a call of `model` is a decode step of one token a row, with nothing special asked."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or ids.shape[1] != 1 or given.get("use_cache") is False or torch.is_grad_enabled() or model.training:
        return False
    if options(given).keys() - {"logits_to_keep", "return_dict"} or given.get("return_dict") is False:
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def hidden(given: dict[str, Any]) -> Tensor | None:
    """The mask ``[B, L]`` of a step that hides tokens, such as padding; waits for the device."""
    mask: Tensor | None = given.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def same_kind(inputs: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether a step recorded with one can be taken with the other."""
    if inputs.keys() != others.keys():
        return False
    for x, y in ((inputs[name], others[name]) for name in inputs):
        tensors = isinstance(x, Tensor), isinstance(y, Tensor)
        if tensors[0] != tensors[1] or (not tensors[0] and x != y):
            return False
        if tensors[0] and (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
            return False
    return True


def same(now: Held, before: Held) -> bool:
    """Whether a layer holds what it held, where it did."""
    return all(one is other for one, other in zip(now, before, strict=True))


def level(layers: Sequence[LayerCache]) -> bool:
    """Whether all layers have the next token's place in common: not after a turn that was broken off between them."""
    return len({len(layer.window) for layer in layers}) == 1


def hiding(layers: Sequence[LayerCache]) -> set[int | None]:
    """The reaches of layers where some token is out of reach before pages move again."""
    return {layer.reach for layer in layers if layer.reach is not None and layer.reach < layer.length + layer.room}


def alone(model: Any, forward: Callable[..., Any]) -> bool:
    """Whether all that a step does is in its kernels: positions are told, and nothing of others' runs inside, as hooks do.

    Hooks by which transformers takes hidden states do nothing unless these are asked for.
    """
    if "position_ids" not in inspect.signature(forward).parameters:
        return False
    for part in model.modules():
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        others = any(getattr(hook, "__name__", "") != CAPTURING for hook in hooks)
        if part is not model and (others or hasattr(part, "_hf_hook")):
            return False
    return True


class Recorder:
    """Records steps of one model, one after another: all on one stream and in the same memory.

    cuBLAS keeps a workspace for each stream that it was used on, and PyTorch the memory of each graph that is gone, until
    memory is short. What outlives a replay, a step's outputs, has places of its own while it is held.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.last: Any = None

    def __deepcopy__(self, memo: dict[int, object]) -> Recorder:
        return Recorder()

    def record(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """A graph of `call`, and its outputs. The memory of one that CUDA refuses stays taken: the next has its own."""
        if self.stream is None and torch.cuda.is_available():
            self.stream = torch.cuda.Stream()
        beside, self.last = self.last, None
        try:
            self.last, outputs = capture(call, self.stream, beside)
        except NotCompiledError:
            self.last = beside
            raise
        return self.last, outputs


class Steps:
    """The decode step of one cache: taken as usual first, recorded, replayed, and recorded anew where pages that have moved
    cannot be told to what was recorded.

    Attributes
    ----------
    model : PreTrainedModel or None
        Whose step it is.
    graph, outputs
        What was recorded, and the outputs that each replay writes; None before.
    place : Place or None
        Where each step finds what changes from step to step; None before.
    inference : bool
        Whether the last step was taken in inference mode.
    """

    def __init__(self) -> None:
        self.wanted = True
        self.forget()

    def __deepcopy__(self, memo: dict[int, object]) -> Steps:
        return Steps()

    def forget(self) -> None:
        """Forget what was recorded."""
        self.graph: Any = None
        self.outputs: Any = None
        self.model: Any = None
        self.inputs: dict[str, Any] = {}
        self.padded = False
        self.inference = torch.is_inference_mode_enabled()
        self.place: Place | None = None
        self.held: list[Held] = []

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        held = [*self.inputs.values(), *(self.outputs or {}).values()]
        if self.place is not None:
            held += [self.place.index, self.place.count, *self.place.masks.values()]
        return [x for x in held if isinstance(x, Tensor)]

    def take(
        self,
        model: Any,
        forward: Callable[..., Any],
        recorder: Recorder,
        given: dict[str, Any],
        layers: Sequence[LayerCache],
    ) -> Any | None:
        """The outputs of a step; None where it must be taken as usual. Pages may be due to move then.

        Parameters
        ----------
        model : PreTrainedModel
        forward : callable
            Its own.
        recorder : Recorder
            The model's.
        given : dict
            Its arguments, by name.
        layers : sequence of LayerCache
        """
        if not self.wanted or not layers[0].where or not plain_step(model, given):
            return None
        inputs, mask = self._inputs(given, layers[0].length), hidden(given)
        if mask is not None and mask.shape != (len(given["input_ids"]), layers[0].length + 1):
            return None
        alike = self.model is model and same_kind(inputs, self.inputs) and self.padded == (mask is not None)
        alike = alike and self._writable()
        begun, again = alike and self._stands(layers), alike and self.graph is not None
        if not begun and not self._begin(model, forward, inputs, mask, layers):
            return None
        # After the last token that there is room for pages move, which must not be recorded.
        if min(layer.room for layer in layers) <= (self.graph is None):
            return None
        self._place(inputs, mask, layers)
        call = partial(self._call, forward, given["past_key_values"], layers)
        if not begun:
            self.held = [layer.held() for layer in layers]
            # Kernels of a step like one that was recorded have run, but for those that other pages may need.
            if not again or self._record(call, recorder) is not None:
                return call()
        elif self.graph is None:
            refused = self._record(call, recorder)
            if refused is not None:
                LOG.warning("decode steps of this model are not recorded, since a CUDA graph refused one: %s", refused)
                self.wanted = False
                self.forget()
                for layer in layers:
                    layer.window.advance(-1)
                return None
        self.graph.replay()
        return copied(self.outputs)

    def _inputs(self, given: dict[str, Any], length: int) -> dict[str, Any]:
        """What a step is given, but for the cache."""
        ids, positions = given["input_ids"], given.get("position_ids")
        positions = torch.full_like(ids[:1], length) if positions is None else positions
        return {"input_ids": ids, "position_ids": positions, **options(given)}

    def _writable(self) -> bool:
        """Whether its places may be written: not outside of inference mode where they were made in it."""
        return self.place is None or torch.is_inference_mode_enabled() or not self.place.index.is_inference()

    def _stands(self, layers: Sequence[LayerCache]) -> bool:
        """Whether what was recorded, or is about to be, reads what layers hold: where it did, or where that was told."""
        if len(self.held) != len(layers):
            return False
        held = [layer.held() for layer in layers]
        unmoved, inference = all(map(same, held, self.held)), torch.is_inference_mode_enabled()
        if unmoved and inference == self.inference:
            return True
        # What layers hold may have been made in inference mode since; the next turn writes to it.
        if not all(layer.writable for layer in layers):
            return False
        self.inference = inference
        if unmoved:
            return True
        if self.graph is None or self.place is None or not level(layers):
            return False
        masks, most = self.place.masks, layers[0].length + layers[0].room
        if not hiding(layers) <= masks.keys() or any(seen.shape[-1] < most for seen in masks.values()):
            return False
        follows = all(layer.follow(before) for layer, before in zip(layers, self.held, strict=True))
        self.held = held
        return follows

    def _begin(
        self,
        model: Any,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        mask: Tensor | None,
        layers: Sequence[LayerCache],
    ) -> bool:
        """Make room for steps until pages move; whether they can be recorded."""
        self.forget()
        if not level(layers) or not all(layer.recordable for layer in layers) or not alone(model, forward):
            return False
        for layer in layers:
            layer.reserve()
        device = inputs["input_ids"].device
        index, count = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int32, device=device)
        whole, rows = layers[0].length + layers[0].room, 1 if mask is None else len(mask)
        whole += max(ROOM, whole // 8, layers[0].plan.most)
        masked = hiding(layers) if mask is None else {layer.reach for layer in layers}
        seen = {reach: torch.ones(rows, 1, 1, whole, dtype=torch.bool, device=device) for reach in masked}
        self.place = Place(index, count, seen)
        self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.padded, self.model = mask is not None, model
        return True

    def _place(self, inputs: dict[str, Any], mask: Tensor | None, layers: Sequence[LayerCache]) -> None:
        """Tell the device this step's tokens, where they go, and what they may see."""
        for name, x in self.inputs.items():
            if isinstance(x, Tensor):
                x.copy_(inputs[name])
        index, length = len(layers[0].window), layers[0].length + 1
        if self.place is not None:
            self.place.index.fill_(index)
            for told, number in zip(self.place.count.unbind(), (index + 1, layers[0].window.start), strict=True):
                told.fill_(number)
            for reach, seen in self.place.masks.items():
                seen[..., :length] = True if mask is None else mask[:, None, None]
                if reach is not None:
                    seen[..., : max(0, length - reach)] = False
        for layer in layers:
            layer.advance(1)

    def _call(self, forward: Callable[..., Any], cache: Any, layers: Sequence[LayerCache]) -> Any:
        """Take the step at the places told."""
        for layer in layers:
            layer.window.place = self.place
        try:
            return forward(**self.inputs, past_key_values=cache, use_cache=True)
        finally:
            for layer in layers:
                layer.window.place = None

    def _record(self, call: Callable[[], Any], recorder: Recorder) -> Exception | None:
        """Record a step; what was raised if that was not possible, as where a kernel has not run yet."""
        try:
            self.graph, self.outputs = recorder.record(call)
        except (RuntimeError, NotCompiledError) as error:
            return error
        return None
