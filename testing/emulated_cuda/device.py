"""Tensors that say they are on a CUDA device, and what happens to each operator that meets one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

CUDA = torch.device('cuda', 0)

COPIES = (aten._to_copy.default, aten.copy_.default)
"""What moves between the memories."""

READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
"""What the host waits for, beside copies to it."""

INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Their indices may be on the CPU, from where they are copied."""


@dataclass
class Counts:
    """What the device was asked for since these were made."""

    to_device: int = 0
    """Copies from the host's memory."""
    to_host: int = 0
    """Copies to the host, and numbers that it reads."""
    waits: int = 0
    """How often the host waits for all that it asked for: at every copy and read, except at copies from
    page-locked memory that it does not wait for."""
    launches: int = 0
    """Operators that are not views."""
    replays: int = 0


class EmulatedTensor(torch.Tensor):
    """A tensor that says it is on the device."""

    inner: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> EmulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.current().dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> EmulatedTensor:
        if id(self) not in memo:
            copied = EmulatedTensor(self.inner.clone()).requires_grad_(self.requires_grad)
            copied.__dict__ |= {name: value for name, value in self.__dict__.items() if name != 'inner'}
            memo[id(self)] = copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return EmulatedTensor, (self.inner,)

    @property
    def data(self) -> EmulatedTensor:
        return EmulatedTensor(self.inner.detach())

    @data.setter
    def data(self, other: EmulatedTensor) -> None:
        self.inner = other.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()


@dataclass
class Recorded:
    """One operator of a capture, over the tensors inside."""

    func: Any
    args: Any
    kwargs: Any
    answers: Sequence[torch.Tensor]


class Device(TorchDispatchMode):
    """The device while it is there."""

    _current: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.recording: list[Recorded] | None = None

    @classmethod
    def current(cls) -> Device:
        if cls._current is None:
            raise RuntimeError('the emulated device is gone, one of its tensors is not')
        return cls._current

    def __enter__(self) -> Device:
        Device._current = self
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        Device._current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run ``func``, on what is inside of the device's tensors."""
        tensors = _tensors(*args, *kwargs.values())
        outside = {id(each.inner): each for each in tensors if isinstance(each, EmulatedTensor)}
        asked = kwargs.get('device')
        if asked is None:
            lands = bool(outside) if func is not aten.copy_.default else isinstance(args[0], EmulatedTensor)
        else:
            lands = torch.device(asked).type == 'cuda'
            kwargs = kwargs | {'device': torch.device('cpu')}
        if not outside and not lands:
            return func(*args, **kwargs)
        self._meet(func, args, kwargs, tensors, lands)
        args = _mapped(_inside, args)
        kwargs = {name: _mapped(_inside, value) for name, value in kwargs.items()}
        got = func(*args, **kwargs) if self.recording is None else self._record(func, args, kwargs)
        if not lands:
            return got
        return _mapped(lambda each: _outside(each, outside), got)

    def _meet(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], lands: bool
    ) -> None:
        """Refuse what CUDA refuses, and count."""
        here = [isinstance(each, EmulatedTensor) for each in tensors]
        if func in COPIES:
            source = isinstance(args[1] if func is aten.copy_.default else args[0], EmulatedTensor)
            if source != lands:
                self._crosses(func, to_host=source, waits=not _in_passing(func, args, kwargs))
        elif func in READS or _depends_on_data(func, args):
            self._crosses(func, to_host=True)
        elif func in INDEXED:
            away = [each for each in args[1] if each is not None and not isinstance(each, EmulatedTensor)]
            for _ in away:
                self._crosses(func, to_host=False)
            if not isinstance(args[0], EmulatedTensor):
                raise RuntimeError(f'{func}: indices are on cuda:0, what they index is on the CPU')
        elif any(here) and not all(here):
            away = [tuple(each.shape) for each, at in zip(tensors, here, strict=True) if not at and each.ndim]
            if away:
                raise RuntimeError(
                    f'{func}: expected all tensors to be on the same device, but found at least two devices, '
                    f'cuda:0 and cpu (shapes {away})'
                )
        self.counts.launches += not func.is_view and self.recording is None

    def _crosses(self, func: Any, *, to_host: bool, waits: bool = True) -> None:
        if self.recording is not None:
            raise RuntimeError(f'CUDA error: operation not permitted when stream is capturing ({func})')
        self.counts.waits += waits
        if to_host:
            self.counts.to_host += 1
        else:
            self.counts.to_device += 1

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write down an operator without running it: what it answers is not yet known, and what it writes
        to stays as it is."""
        assert self.recording is not None
        given = _tensors(*args, *kwargs.values())
        written = _written(func, args, kwargs)
        if written:
            self.recording.append(Recorded(func, args, kwargs, []))
            return written[0] if len(written) == 1 else tuple(written)
        got = func(*args, **kwargs)
        places = {each.untyped_storage().data_ptr() for each in given}
        fresh = [each for each in _tensors(got) if each.untyped_storage().data_ptr() not in places]
        if fresh:
            self.recording.append(Recorded(func, args, kwargs, fresh))
        for each in fresh:
            each.fill_(float('nan') if each.is_floating_point() or each.is_complex() else 0)
        return got


def replay(recorded: Sequence[Recorded]) -> None:
    """Do again what a capture recorded, where it was recorded."""
    for each in recorded:
        got = each.func(*each.args, **each.kwargs)
        if each.answers:
            for place, answer in zip(each.answers, _tensors(got), strict=True):
                place.copy_(answer)


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """What :meth:`torch.Tensor.pin_memory` gives."""
    copied = tensor.clone()
    copied.page_locked = True  # type: ignore[attr-defined]
    return copied


def _in_passing(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host goes on while a copy is made."""
    if func is aten.copy_.default:
        source, asked = args[1], args[2] if len(args) > 2 else kwargs.get('non_blocking', False)
    else:
        source, asked = args[0], kwargs.get('non_blocking', False)
    return asked and getattr(source, 'page_locked', False)


def _tensors(*values: Any) -> list[torch.Tensor]:
    """Those among values and in the lists among them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
    return found


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of a value, or of each in a list of them."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, each) for each in value)
    return function(value)


def _inside(value: Any) -> Any:
    return value.inner if isinstance(value, EmulatedTensor) else value


def _outside(value: Any, known: dict[int, EmulatedTensor]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return known[id(value)] if id(value) in known else EmulatedTensor(value)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that ``func`` writes to, by its schema."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[number] if number < len(args) else kwargs[argument.name])
    return written


def _depends_on_data(func: Callable[..., Any], args: Any) -> bool:
    """Whether the shape of what ``func`` gives depends on numbers, for which the host waits."""
    tags = func.tags  # type: ignore[attr-defined]
    if func in INDEXED:
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
