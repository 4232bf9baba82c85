"""A sweep as it is written in a file or on the command line: a grid of methods, and tasks."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    model_validator,
)

from lzero_kv.budget import ALLOCATIONS, SELECTIONS
from lzero_kv.budget.choices import parameters_of
from lzero_kv.budget.config import INTERVAL
from lzero_kv.llm.budget import PromptBudget
from lzero_kv.llm.experiment.documents import PYTHON, SHAKESPEARE, texts_in
from lzero_kv.llm.experiment.methods import ALGORITHMS, FULL, Method
from lzero_kv.llm.experiment.models import DTYPES, SMOLLM2
from lzero_kv.llm.experiment.tasks import TASKS
from lzero_kv.mistakes import Mistakes, describe, did_you_mean
from lzero_kv.sweep.rows import versions

RECORDS = '.jsonl'
TOLD = ('torch', 'transformers')


def _several(value: Any) -> Any:
    """One value as a list of it."""
    return value if isinstance(value, (list, tuple)) else [value]


Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[StrictInt, Field(ge=1)]
Natural = Annotated[StrictInt, Field(ge=0)]


class Plan(BaseModel):
    """What a sweep measures. Frozen; every mistake is reported in one ValueError."""

    model_config = ConfigDict(
        frozen=True, extra='forbid', use_attribute_docstrings=True, validate_default=True
    )

    model: str = SMOLLM2
    """A folder with a checkpoint, a name of the hub, or 'smollm2'."""
    dtype: str = DTYPES[0]
    """Of the weights."""
    algorithm: Texts = ALGORITHMS
    """Algorithms of the grid; the full cache is always measured."""
    ratios: Annotated[tuple[Ratio, ...], BeforeValidator(_several)] = (0.5, 0.25, 0.125)
    """Slots as parts of all tokens."""
    allocation: Texts = ()
    """How slots are divided among the layers; empty for the default of a PromptBudget."""
    parameters: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_several)]] = {}
    """Other fields of a PromptBudget, each with one value or several; a method takes those that it reads."""
    methods: Texts = ()
    """Further methods by name, such as 'h2o heavy_ratio=0.1 recent_ratio=0.1' or 'cake window=16 0.25'."""
    tasks: Texts = ()
    """Names of TASKS; empty for 'continuation', or for the records' own where all data are records."""
    documents: Positive = 24
    """Of each task and text."""
    length: Positive = 1024
    """Tokens of a document's prompt."""
    data: Texts = ()
    """Texts of the tasks: 'shakespeare', 'python', files or folders, empty for each task's own; files .jsonl
    are records of LongBench or RULER and bring tasks of their own."""
    speed: Natural = 0
    """Documents on which the time to the first token and of each further token is measured."""
    seed: Natural = 0
    """Of the documents."""

    @model_validator(mode='after')
    def _refuse_impossible_choices(self) -> Self:
        if problems := _problems(self):
            raise Mistakes('sweep', problems)
        return self

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """A mapping as a plan.

        Arguments:
            given: fields by name. ``cake_experiment_config`` and ``cake_model_specific_config``, in the words
                of :func:`lzero_kv.llm.apply_cake_to_model`, stand for the methods of their experiments.

        Raises:
            ValueError: unknown names, wrong values or impossible choices: one line for each, all at once.
        """
        try:
            return cls.model_validate(_with_experiments(dict(given)))
        except ValidationError as error:
            items: Any = error.errors()
        if items[0]['loc']:
            raise Mistakes('sweep', [describe(item, cls, _EXPECTED) for item in items])
        raise items[0]['ctx']['error']

    @property
    def texts(self) -> list[str]:
        """The data that are no records."""
        return [name for name in self.data if not name.endswith(RECORDS)]

    @property
    def asked(self) -> tuple[str, ...]:
        """The tasks that are not those of records."""
        only_records = self.data and not self.texts
        return self.tasks or (() if only_records else ('continuation',))

    def grid(self) -> list[Method]:
        """The full cache, then the methods of each ratio, then those given by name; each once.

        Raises:
            ValueError: a combination is impossible.
        """
        combinations = itertools.product(
            self.ratios,
            [name for name in self.algorithm if name != FULL],
            self.allocation or (None,),
            itertools.product(*self.parameters.values()),
        )
        asked = [Method(FULL)]
        for ratio, algorithm, allocation, values in combinations:
            method = Method(algorithm, ratio, allocation=allocation)
            read = _read_by(method)
            options = {
                name: value for name, value in zip(self.parameters, values, strict=True) if name in read
            }
            asked.append(Method(algorithm, ratio, allocation=allocation, options=options))
        asked += [Method.parse(name) for name in self.methods]
        return list({method.name: method for method in asked}.values())

    def header(self) -> dict[str, Any]:
        """What pins a sweep: rows of two sweeps with the same header may stand in one file."""
        return {
            **self.model_dump(include={'model', 'dtype', 'documents', 'length', 'speed', 'seed'}),
            'tasks': list(self.asked),
            'data': {name: _digest(name) for name in self.data},
            'methods': [method.name for method in self.grid()],
            'versions': versions(*TOLD),
        }


def _with_experiments(given: dict[str, Any]) -> dict[str, Any]:
    """The methods of a CAKE experiment in the place of its configuration, and no other algorithm unless
    asked for."""
    configs = [given.pop(name, None) for name in ('cake_experiment_config', 'cake_model_specific_config')]
    if configs == [None, None]:
        return given
    from lzero_kv.llm import CAKEExperimentConfig

    experiment = CAKEExperimentConfig.read(configs[0] or {}, 'cake_experiment_config')
    budgets = [budget for _, budget in experiment.budgets(configs[1])]
    names = [_method_of(budget).name for budget in budgets]
    return {'algorithm': FULL, **given, 'methods': [*_several(given.get('methods', [])), *names]}


def _method_of(budget: Mapping[str, Any]) -> Method:
    """The method with these fields of a PromptBudget."""
    others = dict(budget)
    own = {name: others.pop(name, None) for name in ('ratio', 'tokens', 'allocation')}
    return Method(others.pop('selection'), **own, options=others)


def plan_from_file(path: Path) -> dict[str, Any]:
    """The fields of a :class:`Plan` in a file .toml or .json.

    Raises:
        ValueError: the file is missing, has another ending or cannot be read.
    """
    readers = {'.toml': tomllib.loads, '.json': json.loads}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f'a grid must be a file that ends in .toml or .json, got {path}')
    try:
        found = readers[path.suffix](path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no {path.suffix[1:].upper()}: {error}') from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} must hold the fields of a sweep by name, got a {type(found).__name__}')
    return found


def _digest(source: str) -> str:
    """The beginning of the SHA-256 of a file; that of the names and sizes of a folder's texts."""
    path = Path(source).expanduser()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if path.is_dir():
        files = sorted((file.relative_to(path).as_posix(), file.stat().st_size) for file in texts_in(path))
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    return 'of a package'


def _read_by(method: Method) -> set[str]:
    """Fields of a PromptBudget that a method reads."""
    tables: Any = (SELECTIONS, method.algorithm), (ALLOCATIONS, method.allocation)
    chosen = {name for table, key in tables for name in parameters_of(table[key])}
    special = {name for table, _ in tables for one in table.values() for name in parameters_of(one)}
    return (_PARAMETERS - special) | chosen


def _problems(plan: Plan) -> list[str]:
    """What is wrong about a plan whose fields are right for themselves."""
    return [*_unknown_names(plan), *_missing_data(plan)] or [*_wrong_methods(plan)]


def _unknown_names(plan: Plan) -> Iterator[str]:
    tables: dict[str, Sequence[str]] = {
        'algorithm': ALGORITHMS,
        'allocation': tuple(ALLOCATIONS),
        'tasks': tuple(TASKS),
        'dtype': DTYPES,
    }
    for field, allowed in tables.items():
        for name in _several(getattr(plan, field)):
            if name is not None and name not in allowed:
                expected = f'expected one of {list(allowed)}, got {name!r}'
                yield f'{field}: {expected}{did_you_mean(name, allowed)}'


def _missing_data(plan: Plan) -> Iterator[str]:
    for name in plan.data:
        if name not in (SHAKESPEARE, PYTHON) and not Path(name).expanduser().exists():
            yield f'data: expected {SHAKESPEARE!r}, {PYTHON!r}, a file or a folder, got {name!r}'


def _wrong_methods(plan: Plan) -> Iterator[str]:
    if unknown := [name for name in plan.parameters if name not in _PARAMETERS]:
        yield from (f'parameters.{name}: {_no_parameter(name)}' for name in unknown)
        return
    try:
        methods = plan.grid()
    except Mistakes as error:
        yield from error.problems
        return
    read = {name for method in methods if method.algorithm != FULL for name in _read_by(method)}
    yield from (
        f'parameters: none of the methods reads {name}' for name in plan.parameters if name not in read
    )
    for method in methods:
        if method.algorithm != FULL:
            yield from _too_small(method, plan.length)


def _no_parameter(name: str) -> str:
    if name in _WORDS:
        return f'it has a word of its own; write {_WORDS[name]}'
    return f'there is no such field of a PromptBudget{did_you_mean(name, sorted(_PARAMETERS))}'


def _too_small(method: Method, length: int) -> Iterator[str]:
    """A method that would hold more in a document than it says."""
    budget = PromptBudget.read(method.budget() or {})
    try:
        budget.sizes(1, length, budget.interval(INTERVAL))
    except ValueError as error:
        yield f'{method.name}: {error}'


_WORDS = {'ratio': 'ratios', 'allocation': 'allocation', 'selection': 'algorithm', 'tokens': 'methods'}
"""Fields of a PromptBudget that are no parameters, and the field of a plan for each."""
_PARAMETERS = set(PromptBudget.model_fields) - set(_WORDS)
_EXPECTED = {
    'model': 'a name or a folder',
    'dtype': f'one of {list(DTYPES)}',
    'ratios': 'numbers greater than 0 and at most 1',
    'parameters': 'names of a PromptBudget, each with a value or a list of values',
    'documents': 'an integer of at least 1',
    'length': 'an integer of at least 1',
    'speed': 'an integer of at least 0',
    'seed': 'an integer of at least 0',
    **dict.fromkeys(('algorithm', 'allocation', 'methods', 'tasks', 'data'), 'a name or a list of names'),
}
