"""A pretended CUDA device: tensors that say they are on a GPU, compute on the CPU, and refuse what a GPU refuses.

`with cuda(): model.cuda()` and everything after it is computed for real, by the CPU's kernels. What torch would refuse
with a card is refused: operands on two devices, a generator of another device than what it fills, `numpy()` without
`cpu()`, and, while a graph is captured, all that must not be captured. Captured graphs replay as CUDA's do: the same
operations on the same memory, and no Python. Not pretended: CUDA's own kernels, what `torch.compile` makes for them,
streams that run side by side, and the rules of autocast, which are those of the CPU.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CARD = torch.device("cuda", 0)

BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor, aten._unsafe_index_put.default}
"Operations whose indices may lie on the CPU."
SCALARS = {aten.fill_.Tensor, aten.masked_fill_.Tensor, aten.masked_fill.Tensor, aten.where.self}
"Operations that, like elementwise ones, take a number that lies on the CPU."
UNKNOWN_SHAPE = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.unique_dim.default, aten.bincount.default, aten.repeat_interleave.Tensor, aten.equal.default,
}
"Operations that wait for numbers of the GPU, since their result or its shape depends on them."


class MixedDevices(RuntimeError):
    "Operands are on two devices, or a generator is of another than what it fills."


class NotCapturable(RuntimeError):
    "What cannot be part of a captured graph."


class OnCard(torch.Tensor):
    "A tensor on the pretended card."
    elem: torch.Tensor      # the numbers
    __torch_function__ = torch._C._disabled_torch_function_impl      # type: ignore[assignment]
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> OnCard:
        with torch._C.DisableTorchFunction():
            out = torch.Tensor._make_wrapper_subclass(
                cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(),
                dtype=elem.dtype, layout=elem.layout, requires_grad=elem.requires_grad,
            )      # fmt: skip
            out.elem = elem.detach()
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None,
    ) -> Any:
        return carry_out(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:      # type: ignore[override]
        return f"OnCard({self.elem!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnCard:
        if id(self) not in memo:
            out = OnCard(self.elem.clone()).requires_grad_(self.requires_grad)
            out.__dict__.update({k: v for k, v in self.__dict__.items() if k != "elem"})
            memo[id(self)] = out
        return memo[id(self)]

    def numpy(self, *args: Any, **how: Any) -> Any:
        "Refuse, as tensors of a GPU do."
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        "Read the numbers."
        _reads("tolist")
        return self.elem.tolist()

    def data_ptr(self) -> int:
        "Where the numbers lie."
        return self.elem.data_ptr()

    def get_device(self) -> int: return 0

    def cpu(self, *args: Any, **how: Any) -> torch.Tensor:
        "Copy to the CPU."
        return _moved(self, False)


OnCard.__name__ = "Tensor"      # as the library's check of weights asks for


def on_card(x: Any) -> bool: return isinstance(x, OnCard)


# ── from device to device ────────────────────────────────────────────────────────────────────────────────────────────

class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: bool) -> torch.Tensor:
        ctx.there = there
        return OnCard(x.detach().clone()) if there else x.elem.clone()      # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _moved(grads[0], not ctx.there), None


def _moved(x: torch.Tensor, there: bool) -> torch.Tensor:
    if on_card(x) == there: return x
    _reads("copying between the card and the CPU")
    return _Move.apply(x, there)


_to, _tensor, _as_tensor, _Autocast = torch.Tensor.to, torch.tensor, torch.as_tensor, torch.autocast


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int): return True
    return torch.device(device).type == "cuda"


def _to_device(x: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
    "`Tensor.to`."
    device, rest = how.pop("device", None), list(args)
    if rest and isinstance(rest[0], torch.Tensor): device, rest[0] = rest[0].device, rest[0].dtype
    elif rest and isinstance(rest[0], (str, int, torch.device, type(None))): device = rest.pop(0)
    if "other" in how:
        other = how.pop("other")
        device, how["dtype"] = other.device, other.dtype
    how.pop("non_blocking", None)
    rest = [a for a in rest if a is not None and not isinstance(a, bool)]
    moved = x if device is None else _moved(x, _is_cuda(device))
    if device is not None and not _is_cuda(device): how["device"] = device      # from meta, too
    if rest and isinstance(rest[0], torch.dtype): how["dtype"] = rest.pop(0)
    return _to(moved, *rest, **how) if rest or how else moved


def _cuda(x: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor: return _moved(x, True)


_apply = torch.nn.Module._apply


def _convert(module: torch.nn.Module, f: Callable[..., torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    "`Module.to` and its like; tied parameters stay tied."
    before = [*module.parameters(), *module.buffers()]
    stays = not any(map(on_card, before)) and not any(on_card(f(t.detach())) for t in before)
    if stays: return _apply(module, f, recurse)
    known: dict[int, Any] = {id(None): None}
    for m in module.modules():
        for own in (m._parameters, m._buffers):
            for name, t in own.items():
                if id(t) not in known: known[id(t)] = _converted(t, f)
                own[name] = known[id(t)]
    return module


def _converted(t: Any, f: Callable[..., torch.Tensor]) -> torch.Tensor:
    new = f(t.detach())
    if on_card(new) == on_card(t) and new.dtype == t.dtype: return t
    return torch.nn.Parameter(new, t.requires_grad) if isinstance(t, torch.nn.Parameter) else new


def _new(data: Any, *, device: Any = None, requires_grad: bool = False, **how: Any) -> torch.Tensor:
    out = _tensor(data, **how)
    if device is not None and _is_cuda(device): out = _moved(out, True)
    return out.requires_grad_(requires_grad)


def _as(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    out = data if isinstance(data, torch.Tensor) else _as_tensor(data)
    return _to_device(out, dtype=dtype or out.dtype, device=out.device if device is None else device)


def _autocast(device_type: str, *args: Any, **how: Any) -> Any: return _Autocast("cpu", *args, **how)


# ── every operation ──────────────────────────────────────────────────────────────────────────────────────────────────

class Generator(torch.Generator):
    "A generator that may say that it is on the card."

    _cdata: int      # by what C++ knows it

    def __new__(cls, device: Any = "cpu") -> Generator:
        out = super().__new__(cls, "cpu")      # type: ignore[call-arg]
        if _is_cuda(device): _State.generators[out._cdata] = out
        return out

    @property
    def device(self) -> torch.device:      # type: ignore[override]
        "Where it draws."
        return CARD if self._cdata in _State.generators else torch.device("cpu")


class _State:
    "What goes on at present."
    draws: torch.Tensor | None = None      # state of the card's own generator
    graph: Graph | None = None             # that is being captured
    seen: ClassVar[list[str]] = []                   # names of operations on the card
    generators: ClassVar[dict[int, Any]] = {}        # those of the card, by what C++ knows them by
    within = False                         # whether a function of tensors on the card is running


def carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    "Run an operation where its operands say, or refuse."
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there, asked = any(map(on_card, operands)), kwargs.get("device")
    if asked is not None and asked.type == "cuda": target = True
    elif operands: target = there and _same_device(func, args, operands)
    else: target = _State.within
    if _State.graph and (there or target): _check_capture(func, args, operands)
    if asked is not None and asked.type == "cuda": kwargs = {**kwargs, "device": torch.device("cpu")}
    if not there and not target: return func(*args, **kwargs)
    _check_generator(kwargs.get("generator"), target)
    inner_args, inner = tree_map_only(OnCard, lambda t: t.elem, (args, kwargs))
    _State.seen.append(str(func))
    out = _computed(func, inner_args, inner)
    if not target: return args[0] if func is aten.copy_.default else out
    wrapped = tree_map_only(torch.Tensor, OnCard, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _same_device(func: Any, args: Any, operands: list[torch.Tensor]) -> bool:
    "Whether the result is on the card; refuse two devices."
    if func is aten._local_scalar_dense.default: return False
    if func is aten.copy_.default: return on_card(args[0])
    strangers = [x for x in operands if not on_card(x)]
    if func in BY_INDEX and on_card(args[0]):
        index = tree_leaves(args[1])
        strangers = [x for x in strangers if not any(x is i for i in index)]
    number = torch.Tag.pointwise in func.tags or func in SCALARS or func in BY_INDEX
    writes = func._schema.is_mutable and any(args[0] is x for x in strangers)
    if number and not writes: strangers = [x for x in strangers if x.dim()]
    if strangers:
        shapes = [tuple(x.shape) for x in strangers]
        raise MixedDevices(f"{func} got tensors of the card and of the CPU, those of shape {shapes}")
    return True


def _check_generator(generator: Any, target: bool) -> None:
    if generator is None: return
    if (generator._cdata in _State.generators) != target:
        raise MixedDevices("a generator of another device than the tensor that it fills")


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    "Run on the CPU; what is drawn without a generator comes from the card's own."
    graph = _State.graph
    if graph and func._schema.is_mutable:      # capturing runs nothing: memory stays as it is
        graph.ops.append((func, args, kwargs, None))
        return _written(func, args, kwargs)
    drawn = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    with _own_draws() if drawn else nullcontext(): out = func(*args, **kwargs)
    if graph: graph.ops.append((func, args, kwargs, out))
    return out


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    "What an operation that writes into its operands returns."
    where = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    if not func._schema.returns: return None
    into = [where[name] for name in written]
    return into[0] if len(func._schema.returns) == 1 else tuple(into)


@contextmanager
def _own_draws() -> Iterator[None]:
    before = torch.get_rng_state()
    if _State.draws is not None: torch.set_rng_state(_State.draws)
    yield
    _State.draws = torch.get_rng_state()
    torch.set_rng_state(before)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, kwargs or {})


def _backward(
    x: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None,
) -> None:
    torch.autograd.backward(x, gradient, retain_graph, create_graph, inputs=inputs)


class _Functions(TorchFunctionMode):
    "What a function of tensors on the card makes inside is on the card, too."

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, _State.within
        _State.within = any(map(on_card, tree_leaves((args, kwargs))))
        try:
            if func is not torch.Tensor.backward: return func(*args, **kwargs)
            with self: return _backward(*args, **kwargs)
        finally: _State.within = before


# ── graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class Graph:
    "Operations on memory, recorded once and done again."

    def __init__(self) -> None: self.ops: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        "Do everything again, into the same memory."
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for func, args, kwargs, out in self.ops:
                again = func(*args, **kwargs)
                if out is None: continue
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr(): old.copy_(new)


def _check_capture(func: Any, args: Any, operands: list[torch.Tensor]) -> None:
    "Refuse what a capture refuses."
    if func is aten._local_scalar_dense.default: _reads(str(func))
    if func in UNKNOWN_SHAPE: raise NotCapturable(f"{func}: its result depends on numbers of the card")
    masks = [x for x in tree_leaves(args[1]) if x is not None] if func in BY_INDEX else []
    if any(x.dtype in (torch.bool, torch.uint8) for x in masks):
        raise NotCapturable(f"{func} with a mask: its shape depends on numbers of the card")
    away = [x for x in operands if not on_card(x) and x.dim()]
    if away: raise NotCapturable(f"{func} reads {len(away)} tensors of the CPU")


def _reads(what: str) -> None:
    if _State.graph: raise NotCapturable(f"{what}, while a graph is captured")


@contextmanager
def _capturing(graph: Graph, **how: Any) -> Iterator[None]:
    _State.graph = graph
    try: yield
    finally: _State.graph = None


# ── torch.cuda ───────────────────────────────────────────────────────────────────────────────────────────────────────

class Stream:
    "A stream that is always ready."

    def wait_stream(self, other: Stream) -> None: _reads("wait_stream")

    def synchronize(self) -> None: _reads("synchronize")


def _set_state(state: torch.Tensor, device: Any = None) -> None: _State.draws = state.clone()


def _get_state(device: Any = None) -> torch.Tensor:
    return torch.Generator().manual_seed(0).get_state() if _State.draws is None else _State.draws.clone()


def _seed(seed: int) -> None: _State.draws = torch.Generator().manual_seed(int(seed)).get_state()


def _as_it_is(f: Callable[..., Any] | None = None, **how: Any) -> Any:
    return (lambda g: g) if f is None else f


_CUDA: dict[str, Any] = dict(
    is_available=lambda: True, is_bf16_supported=lambda *a, **k: True, is_initialized=lambda: True,
    device_count=lambda: 1, current_device=lambda: 0, get_device_name=lambda *a: "a pretended card",
    get_device_capability=lambda *a: (9, 0), mem_get_info=lambda *a: (1 << 36, 1 << 36), empty_cache=lambda: None,
    synchronize=lambda *a: _reads("synchronize"), manual_seed=_seed, manual_seed_all=_seed,
    get_rng_state=_get_state, set_rng_state=_set_state, _lazy_init=lambda: None,
    Stream=Stream, current_stream=lambda *a: Stream(), stream=lambda s: nullcontext(), CUDAGraph=Graph,
    graph=_capturing,
)
_TORCH: dict[str, Any] = dict(
    Generator=Generator, tensor=_new, as_tensor=_as, autocast=_autocast, compile=_as_it_is,
)


@contextmanager
def cuda() -> Iterator[list[str]]:      # names of the operations that ran on the card, in order
    "Pretend that there is a CUDA device; what would be compiled for it runs as it is written."
    _State.draws, _State.graph, _State.seen, _State.within, _State.generators = None, None, [], False, {}
    with (
        mock.patch.multiple(torch.cuda, **_CUDA), mock.patch.multiple(torch, **_TORCH),
        mock.patch.multiple(torch.Tensor, to=_to_device, cuda=_cuda),
        mock.patch.object(torch.nn.Module, "_apply", _convert), _Operations(), _Functions(),
    ):  # fmt: skip
        yield _State.seen
