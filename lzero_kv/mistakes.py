"""Words for mistakes in a configuration: what was expected, what came, what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def describe(item: Mapping[str, Any], model: type[BaseModel], expected: Mapping[str, str]) -> str:
    """One mistake that pydantic found, on one line.

    Arguments:
        item: one of ``ValidationError.errors()``, of a field, of a nested model's field, or of an item of a
            list.
        model: whose field it is.
        expected: what each field takes, where its choices do not say it.
    """
    (first, *inner), value, fields = item['loc'], item['input'], model.model_fields
    name = str(first)
    nested: Any = fields[name].annotation if inner else None
    if _is_model(nested):
        return f'{name}.{describe({**item, "loc": inner}, nested, expected)}'
    if item['type'] == 'extra_forbidden':
        return f'{name}: there is no such field{did_you_mean(name, list(fields))}'
    if item['type'] == 'literal_error' and not inner:
        allowed = list(get_args(fields[name].annotation))
        return f'{name}: expected one of {allowed}, got {value!r}{did_you_mean(str(value), allowed)}'
    wanted = expected.get(name, 'True or False')
    return f'{name}: expected {wanted}, got {value!r} of type {type(value).__name__}'


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """The end of a message about an unknown name."""
    close = close_name(name, allowed)
    return f'; did you mean {close!r}?' if close else f'; allowed: {", ".join(allowed)}'


def close_name(name: str, allowed: Sequence[str]) -> str | None:
    """The allowed name that ``name`` was meant to be; None where there is none."""
    close = difflib.get_close_matches(name.lower(), allowed, n=1, cutoff=0.65)
    return close[0] if close else None


class Mistakes(ValueError):
    """All mistakes of one configuration, a line for each.

    Arguments:
        place: where it stands, such as 'world_model_cfg.kv_cache'.
        problems: beginning with the name of a field of it.

    Attributes:
        problems: the same, beginning with the last name of the place.
    """

    def __init__(self, place: str, problems: Sequence[str]) -> None:
        super().__init__(place, problems)
        self.place = place
        self.problems = [f'{place.rpartition(".")[2]}.{text}' for text in problems]

    def __str__(self) -> str:
        lines = [f'  {problem}' for problem in self.problems]
        return '\n'.join([f'{len(lines)} mistake(s) in {self.place}:', *lines])
