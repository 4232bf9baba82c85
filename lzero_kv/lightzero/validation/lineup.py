"""What a manager that is off may have served: other histories, and the true one with its tokens misplaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lzero_kv.lightzero.validation.diagnosis import Candidate, Suspect
from lzero_kv.lightzero.validation.histories import TrueHistories
from lzero_kv.lightzero.validation.opinion import Compared
from lzero_kv.lightzero.validation.recompute import Answer, Recompute, Token, TokenWindow
from lzero_kv.validation.causes import Fault


class Lineup:
    """Collects the suspects of a row.

    Args:
        oracle: the reference.
        world_model: the caching world model.
        histories: of all environments.
    """

    def __init__(self, oracle: Recompute, world_model: Any, histories: TrueHistories) -> None:
        self._oracle = oracle
        self._model = world_model
        self._histories = histories

    def of(self, row: Compared, nodes: Sequence[Sequence[Answer]]) -> Suspect:
        """``row``, whose manager is off, with everything that it may have been served instead.

        Args:
            nodes: the true nodes of its search so far, by simulation and row.
        """
        candidates = list(self._candidates(row, nodes))
        return Suspect(
            row.kv,
            row.truth.served,
            row.answers,
            row.truth.answers,
            lambda: self._misplaced(row),
            lambda: self._displaced(row),
            candidates,
        )

    def _candidates(self, row: Compared, nodes: Sequence[Sequence[Answer]]) -> Iterator[Candidate]:
        if row.kind != 'roots':  # first: the present root is the newest of the earlier ones too
            for answers in nodes:
                for other, answer in enumerate(answers):
                    fault = Fault.ANOTHER_NODE if other == row.row else Fault.OTHER_ENVIRONMENT
                    yield Candidate(fault, answer.window.kv())
        for env_id, history in self._histories:
            fault = Fault.STALE_ENTRY if env_id == row.name.env_id else Fault.OTHER_ENVIRONMENT
            if row.kind != 'reanalysis':
                yield from (Candidate(fault, kv) for kv in history.earlier)

    def _misplaced(self, row: Compared) -> Iterator[dict[str, torch.Tensor]]:
        """Answers of the true history with its newest tokens one or two places off."""
        truth = row.truth
        window = (
            TokenWindow((), ((),) * self._model.num_layers, ((),) * self._model.num_layers)
            if truth.served is None
            else TokenWindow.of(truth.served, truth.positions[0], self._model.num_heads)
        )
        limit = len(self._model.pos_emb.weight) if not self._oracle.rotary else 1 << 62
        for off in (-2, -1, 1, 2):
            place = len(window.tokens) + off
            if not 0 <= place < limit - 1:
                continue
            grown, answers = window, {}
            if truth.action is not None:
                grown, out = self._oracle.append(grown, Token(truth.action, truth.positions[0] + off), place)
                if 'reward' in truth.answers:
                    answers['reward'] = self._oracle.reward(out)
                place += 1
            _, out = self._oracle.append(grown, Token(truth.latent, truth.positions[1] + off), place)
            yield {**answers, 'policy': self._oracle.policy(out), 'value': self._oracle.value(out)}

    def _displaced(self, row: Compared) -> Iterator[torch.Tensor]:
        """Keys and values of the true history with every token one or two places off."""
        if not isinstance(row.course.base, list):
            return  # its tokens are not kept
        tokens = [*row.course.base, *(token for step in row.course.steps[:-1] for token in step)]
        tokens = tokens[-self._oracle.kept :]
        for off in (-2, -1, 1, 2):
            window = TokenWindow((), ((),) * self._model.num_layers, ((),) * self._model.num_layers)
            if not self._oracle.rotary and not 0 <= off <= len(self._model.pos_emb.weight) - len(tokens):
                continue
            for place, token in enumerate(tokens):
                window, _ = self._oracle.append(
                    window, Token(token.embedding, token.position + off), place + off
                )
            yield window.kv()
