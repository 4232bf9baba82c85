"""Scores of methods on a document, beside the full cache on the same document, and the seconds they take;
and scores of a generated answer in [0, 1]: those of RULER and of LongBench (Bai et al., 2024)."""

from __future__ import annotations

import copy
import difflib
import math
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.llm.experiment.documents import Document
from lzero_kv.llm.experiment.methods import FULL, Method
from lzero_kv.llm.families import cache_argument
from lzero_kv.sweep.rows import Row

BINS = 32
"""Parts of a prompt for which the kept tokens are counted."""
TOGETHER = 16
"""Methods that share a prefill: their caches are held at the same time."""
SPEED = 'speed'
"""The task whose documents are timed and not scored."""
TIMED_TOKENS, TIMED_REPEATS = 32, 3
_EVERYTHING = dict(ratio=1.0, allocation='uniform', selection='streaming')


def score(
    model: Any,
    tokenizer: Any,
    document: Document,
    methods: Sequence[Method],
) -> Iterator[Row]:
    """One row for the full cache, then one for each method.

    The prompt is computed once for up to :data:`TOGETHER` methods. Then the target is read with each cache
    (teacher forcing), and where the document has answers one is generated greedily from a copy of it.

    ``kl``, ``perplexity``, ``agreement`` and ``forced`` are of the tokens that are predicted with the cut
    cache: all of the target, without the first one where no question stands between it and the prompt. None
    where there is none.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: of the model.
        document: what is read.
        methods: with different names; the full cache is added where it is missing.

    Yields:
        JSON-able rows. ``task``, ``document``, the fields of :meth:`Method.fields`; ``score``: the document's
        metric, or ``forced`` where it has no answers; ``chance``; ``forced``: part of the target that is the
        argmax; ``kl``: KL(full || method), nats per token; ``perplexity``; ``agreement``: part of the argmax
        that is the full cache's; ``prediction``: the generated text; ``tokens`` of the prompt; of the cache
        behind the prompt ``bytes``, ``full_bytes`` (keys and values alone), ``slots`` per layer,
        ``peak_tokens`` and ``peak_bytes`` (most keys and values held at once, as if the method had been
        alone), ``kept`` (``[layers][32]``, part of the tokens that stays, from the oldest to the newest),
        ``dispersion`` and ``shift`` per layer, None where the allocation does not read them.

    Raises:
        ValueError: two methods have the same name, or the document does not fit the model.
    """
    asked = _with_control(methods)
    control = None
    for start in range(0, len(asked), TOGETHER):
        group = asked[start : start + TOGETHER]
        caches, logits = _filled(model, document, group)
        while caches:
            method, cache = group[len(group) - len(caches)], caches.pop(0)
            measured = _Measured.of(model, tokenizer, document, cache, logits)
            control = control or measured
            yield _row(document, method, measured, control)
            del cache


def timing(model: Any, document: Document, method: Method) -> Row:
    """Seconds to the first token and for each further one, by prefills and decodings of its own.

    Medians of :data:`TIMED_REPEATS` generations of :data:`TIMED_TOKENS` tokens. The full cache is
    transformers' own.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        document: its prompt is read, its answer is not.
        method: the cache.

    Returns:
        ``task``, ``document``, the fields of the method, ``tokens`` of the prompt, ``new_tokens``,
        ``first_token`` and ``next_token`` in seconds.
    """
    seconds = [_timed(model, document, method) for _ in range(TIMED_REPEATS)]
    first, following = (statistics.median(column) for column in zip(*seconds, strict=True))
    return dict(
        task=document.task,
        document=document.id,
        **method.fields(),
        tokens=len(document.prompt),
        new_tokens=TIMED_TOKENS,
        first_token=first,
        next_token=following,
    )


def _with_control(methods: Sequence[Method]) -> list[Method]:
    asked = [Method(FULL), *(method for method in methods if method.algorithm != FULL)]
    names = [method.name for method in asked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'each method must be given once, got twice: {twice}')
    return asked


def _filled(model: Any, document: Document, methods: Sequence[Method]) -> tuple[list[Any], torch.Tensor]:
    """Caches with the prompt, and the logits of its last token ``[vocabulary]``."""
    from lzero_kv.llm.cache import BudgetCache
    from lzero_kv.llm.shared_prefill import prefill

    caches = [BudgetCache(model.config, method.budget() or _EVERYTHING) for method in methods]
    return caches, prefill(model, _ids(model, document.prompt), caches)[0]


@dataclass(frozen=True)
class _Measured:
    """What one cache gave."""

    held: Row
    """Fields of the row about the cache behind the prompt."""
    key_value_bytes: int
    prediction: str | None
    logits: torch.Tensor
    """``[target, vocabulary]``: of each token of the target before it was read."""

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, document: Document, cache: Any, logits: torch.Tensor
    ) -> _Measured:
        held, size = _held(cache, len(document.prompt)), _key_value_bytes(cache)
        if document.question:
            logits = _read(model, cache, document.question)[-1]
        prediction = None
        if document.answers:
            prediction = _generate(model, tokenizer, document, copy.deepcopy(cache), logits)
        further = _read(model, cache, document.target[:-1])
        return cls(held, size, prediction, torch.cat([logits[None], further]))


def _row(document: Document, method: Method, measured: _Measured, control: _Measured) -> Row:
    metrics = forced(document, measured.logits, control.logits)
    scored = metrics['forced']
    if measured.prediction is not None:
        scored = SCORES[document.metric](measured.prediction, document.answers, document.classes)
    return dict(
        task=document.task,
        document=document.id,
        **method.fields(),
        score=scored,
        chance=document.chance,
        **metrics,
        prediction=measured.prediction,
        tokens=len(document.prompt),
        full_bytes=control.key_value_bytes,
        **measured.held,
    )


def forced(document: Document, logits: torch.Tensor, full: torch.Tensor) -> Row:
    """Metrics of the target's tokens, from logits ``[target, vocabulary]``."""
    first = 0 if document.question else 1
    if len(logits) <= first:
        return dict(forced=None, kl=None, perplexity=None, agreement=None)
    target = torch.tensor(document.target[first:], device=logits.device)
    said, right = (values[first:].float().log_softmax(-1) for values in (logits, full))
    kl = (right.exp() * (right - said)).sum(-1)
    loss = -said.gather(-1, target[:, None]).mean()
    best = said.argmax(-1)
    return dict(
        forced=(best == target).double().mean().item(),
        # rounding may leave less than 0; what is no number stays none
        kl=kl.double().mean().clamp(min=0).item(),
        perplexity=math.exp(loss.item()),
        agreement=(best == right.argmax(-1)).double().mean().item(),
    )


def _read(model: Any, cache: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Logits behind each token, ``[tokens, vocabulary]``."""
    if not tokens:
        return torch.empty(0, model.config.vocab_size, device=model.device)
    return _forward(model, cache, tokens)


def _generate(model: Any, tokenizer: Any, document: Document, cache: Any, logits: torch.Tensor) -> str:
    """Greedy text behind a cache."""
    ends, made = _ends(model), []
    while len(made) < document.new_tokens:
        token = int(logits.argmax())
        if token in ends:
            break
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        if document.stop and document.stop in text.lstrip('\n'):
            break
        if len(made) < document.new_tokens:
            logits = _read(model, cache, [token])[-1]
    text = tokenizer.decode(made, skip_special_tokens=True)
    return text.lstrip('\n').partition(document.stop)[0] if document.stop else text


def _ends(model: Any) -> set[int]:
    """Tokens that end a generated text."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _held(cache: Any, tokens: int) -> Row:
    """What a cache with one prompt holds."""
    layers = [cache[layer] for layer in range(len(cache))]
    of_token = layers[0].keys[:, :, :1].nbytes + layers[0].values[:, :, :1].nbytes
    preferences = cache.preferences[0] if cache.preferences else []
    slots = cache.slots[0] if cache.slots else [layer.columns for layer in layers]
    return dict(
        bytes=cache.bytes,
        slots=[int(number) for number in slots],
        peak_tokens=cache.peak_tokens,
        peak_bytes=cache.peak_tokens * of_token,
        kept=[_kept(layer, tokens) for layer in layers],
        dispersion=[one.dispersion for one in preferences] or None,
        shift=[one.shift for one in preferences] or None,
    )


def _kept(layer: Any, tokens: int) -> list[float]:
    """Part of the tokens that stays in each of :data:`BINS` parts of a prompt, mean over groups of heads."""
    kept = layer.positions[layer.tokens.real].cpu().numpy()
    edges = np.linspace(0, tokens, BINS + 1)
    held, there = (np.histogram(some, edges)[0] for some in (kept, np.arange(tokens)))
    groups = layer.positions.shape[1]
    return [round(float(part), 4) for part in held / np.maximum(1, there * groups)]


def _key_value_bytes(cache: Any) -> int:
    return sum(cache[layer].keys.nbytes + cache[layer].values.nbytes for layer in range(len(cache)))


def _timed(model: Any, document: Document, method: Method) -> tuple[float, float]:
    """Seconds to the first token, and the mean of the following ones."""
    cache = _own_cache(model, method)
    start = now(model)
    token = _next(model, cache, document.prompt)
    first = now(model)
    for _ in range(TIMED_TOKENS - 1):
        token = _next(model, cache, [token])
    return first - start, (now(model) - first) / (TIMED_TOKENS - 1)


def _own_cache(model: Any, method: Method) -> Any:
    from transformers.cache_utils import DynamicCache

    from lzero_kv.llm.cache import BudgetCache

    budget = method.budget()
    return DynamicCache(config=model.config) if budget is None else BudgetCache(model.config, budget)


def _next(model: Any, cache: Any, tokens: Sequence[int]) -> int:
    return int(_forward(model, cache, tokens, logits_to_keep=1)[-1].argmax())


@torch.no_grad()
def _forward(model: Any, cache: Any, tokens: Sequence[int], **options: Any) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of a block that is added to a cache."""
    options[cache_argument(type(model))] = cache
    return model(_ids(model, tokens), use_cache=True, **options).logits[0]


def _ids(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=model.device)


def now(model: Any) -> float:
    """Seconds of a clock, when the model's device has done its work."""
    if model.device.type == 'cuda':
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


Score = Callable[[str, Sequence[str], Sequence[str]], float]
"""Of a prediction, the right answers, and the classes of a classification."""

_PUNCTUATION = str.maketrans('', '', string.punctuation)


def found(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Part of the answers that occur in the prediction, in any case (RULER's ``string_match_all``)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def found_any(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Whether one of the answers occurs in the prediction (RULER's ``string_match_part``)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def f1(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles; the best answer counts."""
    said = _words(prediction)
    return max(
        _harmonic((Counter(said) & Counter(right)).total(), said, right) for right in map(_words, answers)
    )


def rouge_l(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of the longest common subsequence of words; the best answer counts."""
    said = prediction.split()
    return max(_harmonic(_common(said, right), said, right) for right in map(str.split, answers))


def edit(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Similarity ``2 M / T`` of the first line that is no comment, ``M`` matching characters of ``T``; the
    best answer counts."""
    lines = prediction.lstrip('\n').split('\n')
    line = next((line for line in lines if not any(mark in line for mark in ('`', '#', '//'))), '')
    return max(difflib.SequenceMatcher(None, line, answer, autojunk=False).ratio() for answer in answers)


def class_named(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """One divided by the classes that the prediction names, if the right one is among them; of a class whose
    name is a part of the right one's nothing is held against it. The best answer counts."""
    named = [one for one in classes if one in prediction]
    return max(_share_of_named(named, answer) for answer in answers)


def number(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Part of the numbers in the prediction that are the number in the answer; the best answer counts."""
    said = re.findall(r'\d+', prediction)
    right = [re.findall(r'\d+', answer) for answer in answers]
    return max((said.count(one[0]) / len(said) for one in right if one and said), default=0.0)


SCORES: dict[str, Score] = {
    'found': found,
    'found_any': found_any,
    'f1': f1,
    'rouge_l': rouge_l,
    'edit': edit,
    'class_named': class_named,
    'number': number,
}
"""The score of each name that a document may have as its metric."""


def _words(text: str) -> list[str]:
    return re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(_PUNCTUATION)).split()


def _harmonic(common: int, said: Sequence[str], right: Sequence[str]) -> float:
    """F1 of ``common`` words."""
    return 2 * common / (len(said) + len(right)) if common else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before, row = row, [0]
        for index, other in enumerate(second):
            row.append(before[index] + 1 if word == other else max(before[index + 1], row[index]))
    return row[-1]


def _share_of_named(named: Sequence[str], answer: str) -> float:
    against = [one for one in named if one == answer or one not in answer]
    return 1 / len(against) if answer in against else 0.0
