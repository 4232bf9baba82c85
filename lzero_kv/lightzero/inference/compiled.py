"""One simulation as one function of tensors on static shapes, which can be compiled, or captured as a graph,
once.

No data-dependent shapes or control flow: the search fills in one matrix of integers, and masks and index
operations do what :class:`Search` does with Python between its operators. All rows take part in every step; a
row without an environment has a history of length 0 and reads and writes scratch rows behind the slots and
the steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lzero_kv.cache.keys import NO_SLOT, NodeKey
from lzero_kv.cache.transfer import refill
from lzero_kv.cache.window import TOKENS_PER_STEP

from .attention import MASK_ROW
from .backends import RUNNERS, Function, Run, StepInputs
from .expand import NOWHERE, Search
from .heads import StepOutputs, predict_policy_value, predict_reward_latent
from .positions import RotaryPositions
from .resources import InferenceResources
from .roots import RootBatch
from .tree import ROOT, Parents, SearchTree
from .weights import InferenceWeights

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference between a runner's first answer and that of the plain function, in parts of the largest
number; other dtypes 5e-2. A compiled step orders its sums in its own way; a wrong one differs by far more."""

LONGEST_PATH = 8
"""Steps between window and node that a step looks at; a simulation that goes deeper is taken eagerly."""

WINDOW, VISIBLE, HELD, PATH, LENGTH, OWN, PENDING, STEP, TOKEN, ACTION = range(10)
"""Columns of :attr:`StepInputs.numbers` in front of the tokens and the path."""
NUMBERS = ACTION + 1


class StepFunction:
    """The step of one world model.

    Args:
        world_model: the host's; embeddings of actions and positions are read from its modules.
        weights: its transformer and heads, not packed.
        kept: tokens that a window keeps.
        exact: whether windows that overflow are derived anew.
    """

    def __init__(self, world_model: Any, weights: InferenceWeights, kept: int, exact: bool) -> None:
        self._weights = weights
        self._kept = kept
        self._exact = exact
        self._continuous = bool(world_model.continuous_action_space)
        self._embed_action = world_model.act_embedding_table
        self._places = None if world_model.config.rotary_emb else world_model.pos_emb.weight

    def plain(self, inputs: StepInputs) -> torch.Tensor:
        """A step in which no window is pending.

        Returns:
            ``[B, embed + embed + support + actions + support]``: output of the last token, latent state,
            reward, policy and value, side by side.
        """
        action = self._action(inputs)
        return self._two_tokens(inputs, action, action[:, None])

    def deriving(self, inputs: StepInputs) -> torch.Tensor:
        """A step in which windows are pending: they are computed from their raw tokens in the pass of the
        action, and stored. Answers as :meth:`plain`."""
        action, columns = self._action(inputs), inputs.numbers[:, NUMBERS : NUMBERS + self._kept]
        window = inputs.tokens.index_select(0, columns.reshape(-1)).view(*columns.shape, -1)
        return self._two_tokens(inputs, action, torch.cat([window, action[:, None]], dim=1))

    def _action(self, inputs: StepInputs) -> torch.Tensor:
        return self._embed_action(inputs.actions if self._continuous else inputs.numbers[:, ACTION])

    def _two_tokens(self, inputs: StepInputs, action: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, n, embed]``: the action, perhaps behind the tokens of the window."""
        weights, numbers = self._weights, inputs.numbers
        layers = len(weights.blocks)
        windows = inputs.storage.index_select(0, numbers[:, WINDOW]).unflatten(1, (layers, 2))
        at = numbers[:, NUMBERS + self._kept :]
        path = inputs.steps.index_select(0, at.reshape(-1)).unflatten(0, at.shape)
        path = path.permute(0, 2, 3, 4, 1, 5, 6).flatten(4, 5)
        added = self._added(inputs, path.shape[4])
        if added is not None:
            windows = windows + added[0]
            path = path + added[1]
        # for each layer [B, 2, heads, columns, head_dim]: window, path and new tokens
        seen = [torch.cat(parts, dim=3) for parts in zip(windows.unbind(1), path.unbind(1), strict=True)]
        deriving = x.shape[1] > 1
        hidden = self._append(inputs, x, seen)
        if deriving:
            derived = torch.stack([layer[:, :, :, : self._kept] for layer in seen], dim=1).flatten(1, 2)
            inputs.storage.index_copy_(0, numbers[:, OWN], derived)
        reward, latent = predict_reward_latent(weights, hidden)
        hidden = self._append(inputs, latent[:, None], seen)
        outputs = predict_policy_value(weights, hidden)
        steps = torch.stack([layer[:, :, :, -TOKENS_PER_STEP:] for layer in seen], dim=1)
        if added is not None:
            steps = steps - added[2]
        inputs.steps.index_copy_(0, numbers[:, STEP], steps)
        if self._exact:
            inputs.tokens.index_copy_(0, numbers[:, TOKEN], action)
            inputs.tokens.index_copy_(0, numbers[:, TOKEN] + 1, latent)
        return torch.cat([hidden, latent, reward, outputs.policy[:, 0], outputs.value[:, 0]], dim=1)

    def _added(self, inputs: StepInputs, path: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """What positions add to the window since it was stored, to the path and to the new tokens, with which
        windows shift; ``[B, layers, 2, heads, n, head_dim]`` each."""
        if not inputs.shift.numel():
            return None
        numbers, kept = inputs.numbers, self._kept
        device = numbers.device
        column = torch.arange(kept, device=device) - kept
        now = (column + numbers[:, VISIBLE, None]).clamp_min(0)
        then = (column + numbers[:, HELD, None]).clamp_min(0)
        behind = torch.arange(-path, TOKENS_PER_STEP, device=device) + numbers[:, LENGTH, None]
        places = torch.cat([now, then, behind.clamp_min(0)], dim=1)
        added = F.embedding(places, inputs.shift.flatten(1)).unflatten(-1, inputs.shift.shape[1:])
        added = added.permute(0, 2, 3, 4, 1, 5)
        now, then, path_added, own = added.split([kept, kept, path, TOKENS_PER_STEP], dim=4)
        return now - then, path_added, own

    def _behind(self, inputs: StepInputs) -> int:
        """The column behind window and path."""
        return self._kept + TOKENS_PER_STEP * (inputs.numbers.shape[1] - NUMBERS - self._kept)

    def _append(self, inputs: StepInputs, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        """Run tokens ``[B, n, embed]`` through the transformer; their last is the newest of its row.

        ``seen`` grows by the newest token. With ``n > 1`` the tokens in front of it are those of the window,
        whose keys and values take the place of the stored ones in rows where they are pending.

        Returns:
            ``[B, embed]``, the output of the newest token.
        """
        weights, kept, heads = self._weights, self._kept, self._weights.heads
        rows, count, embed = x.shape
        numbers, before = inputs.numbers, seen[0].shape[3]
        new = before - self._behind(inputs)  # 0 for the action, 1 for the observation
        if self._places is not None:
            place = (numbers[:, LENGTH] + new)[:, None]
            if count > 1:
                column = torch.arange(kept, device=x.device) - kept
                place = torch.cat([(column + numbers[:, HELD, None]).clamp_min(0), place], dim=1)
            x = x + F.embedding(place, self._places)
        mask = self._mask(inputs, count, before, x)
        pending = (numbers[:, PENDING] > 0)[:, None, None, None, None]
        for layer, block in enumerate(weights.blocks):
            qkv = block.qkv(block.norm1(x.reshape(rows * count, embed))).view(rows, count, 3, heads, -1)
            query, kv = qkv[:, :, 0], qkv[:, :, 1:]
            if inputs.rotation.numel():
                factors = inputs.rotation[:, kept + new : kept + new + 1]
                if count > 1:
                    factors = inputs.rotation[:, : kept + 1]
                query = rotated(query, factors)
                kv = torch.stack([rotated(kv[:, :, 0], factors), kv[:, :, 1]], dim=2)
            kv = kv.permute(0, 2, 3, 1, 4)
            old = seen[layer]
            if count > 1:
                window = torch.where(pending, kv[..., :kept, :], old[..., :kept, :])
                old = torch.cat([window, old[..., kept:, :]], dim=3)
            seen[layer] = torch.cat([old, kv[..., -1:, :]], dim=3)
            if layer == len(weights.blocks) - 1:  # the output of the window's tokens is not asked for
                query, x, mask, count = query[:, -1:], x[:, -1:], mask[:, :, -1:], 1
            keys, values = seen[layer].unbind(1)
            attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
            attended = attended.transpose(1, 2).reshape(rows * count, embed)
            x = block.finish(x.reshape(rows * count, embed), attended).view(rows, count, embed)
        return weights.norm(x[:, -1])

    def _mask(self, inputs: StepInputs, count: int, before: int, like: torch.Tensor) -> torch.Tensor:
        """``[B, 1, n, columns]``: 0 where the tokens may look, -inf elsewhere."""
        numbers, kept, end = inputs.numbers, self._kept, before + 1
        column = torch.arange(end + -end % MASK_ROW, device=like.device)
        window = column >= kept - numbers[:, VISIBLE, None]
        steps = column >= self._behind(inputs) - numbers[:, PATH, None]
        visible = ((column < kept) & window) | ((column >= kept) & steps)
        visible = visible[:, None]
        if count > 1:
            query = torch.arange(kept, device=like.device)[:, None]
            held = column >= kept - numbers[:, HELD, None]
            inside = (column <= query) & held[:, None]
            # a column outside the row sees itself, so that no softmax runs over nothing
            visible = torch.cat([inside | (column == query), visible], dim=1)
        # not torch.where of two numbers, which copies them to the device: a graph must not
        return like.new_zeros(visible.shape).masked_fill(~visible, float('-inf'))[:, None, :, :end]


def rotated(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """:func:`~.attention.rotate` without complex numbers, which compilers do not know: ``x``
    ``[B, n, heads, head_dim]``, ``factors`` ``[B, n, head_dim / 2, 2]``."""
    cosine, sine = factors.unsqueeze(2).unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    # factors are float32 or wider: half precision is rotated in float32
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(3).type_as(x)


class StaticStep:
    """Runs the step of one world model for up to ``rows`` rows, however many of them are in use.

    The first failure switches it off, with one warning; then every search is served without it.

    Args:
        resources: of the world model.
        backend: 'compile' or 'cudagraph'.
        rows: rows of a batch.

    Attributes:
        numbers: int64 ``[rows, 10 + kept + path]`` on the host, to be filled in before a step: see
            :class:`StepInputs`.
    """

    def __init__(self, resources: InferenceResources, backend: str, rows: int) -> None:
        self.rows = rows
        self.numbers = np.zeros((rows, 0), np.int64)
        self._resources = resources
        self._backend = backend
        self._failed = False
        self._simulations = 0
        self._weights: InferenceWeights | None = None
        self._seen: InferenceWeights | None = None
        self._step: StepFunction | None = None
        self._inputs: StepInputs | None = None
        self._runs: dict[bool, Run] = {}

    def serves(self, rows: int) -> bool:
        """Whether searches of so many rows go through here."""
        return not self._failed and rows <= self.rows

    @property
    def steps(self) -> torch.Tensor:
        """The steps' storage of the running search; the last place is scratch."""
        assert self._inputs is not None
        return self._inputs.steps

    def elements(self, simulations: int) -> int:
        """Numbers of memory that a search takes: steps and raw tokens, then what :class:`Search` needs."""
        return sum(self._sizes(simulations)) + Search.elements(self._resources, self.rows, simulations, 0)

    def holds(self, storage: torch.Tensor) -> bool:
        """Whether the running search reads and writes this storage."""
        return self._inputs is not None and self._inputs.storage is storage

    def begin(self, simulations: int, memory: torch.Tensor) -> tuple[StepInputs, torch.Tensor]:
        """Begin a search, with the weights as they are now.

        Args:
            simulations: children each row will get at most.
            memory: flat, :meth:`elements` finite numbers of no meaning.

        Returns:
            Where steps read and write, and the memory that is left for :class:`Search`.
        """
        if self._resources.weights is not self._seen:
            self._take_weights()
        resources, shift = self._resources, self._resources.shift_table()
        storage, inputs = resources.manager.storage.tensor, self._inputs
        self._simulations = max(self._simulations, simulations)
        sizes = self._sizes(self._simulations)
        if (
            inputs is None
            or inputs.storage is not storage
            or inputs.steps.data_ptr() != memory.data_ptr()
            or inputs.steps.numel() != sizes[0]
        ):
            self._inputs = inputs = self._make_inputs(storage, memory, shift)
            self._runs = {}
        if shift is not None:
            inputs.shift.copy_(shift)
        # what a row without an environment reads and writes
        self.numbers[:] = 0
        self.numbers[:, [WINDOW, OWN]] = resources.manager.storage.slots
        self.numbers[:, STEP] = len(inputs.steps) - 1
        begins = np.arange(self.rows) * (len(inputs.tokens) // self.rows)
        self.numbers[:, TOKEN] = begins
        self.numbers[:, NUMBERS : NUMBERS + resources.window.kept] = begins[:, None]
        return inputs, memory[sum(sizes) :]

    def _sizes(self, simulations: int) -> tuple[int, int]:
        """Numbers of steps and of raw tokens; as many as the largest search before this one took."""
        resources, simulations = self._resources, max(simulations, self._simulations)
        columns = resources.window.kept + (TOKENS_PER_STEP * simulations if resources.exact else 0)
        step = TOKENS_PER_STEP * resources.geometry.column
        return (self.rows * simulations + 1) * step, self.rows * columns * resources.manager.layout.embed_dim

    @torch.no_grad()
    def run(self, actions: torch.Tensor, next_positions: np.ndarray, pending: bool) -> torch.Tensor | None:
        """Take a step with :attr:`numbers` as they are.

        Args:
            actions: int64 ``[B]``, or ``[B, action_space_size]`` where actions are continuous.
            next_positions: int64 ``[B]``, logical positions of the actions.
            pending: whether a window is.

        Returns:
            ``[B, ...]`` as of :meth:`StepFunction.plain`; None when this failed, now or before.
        """
        if self._failed or self._inputs is None or self._step is None:
            return None
        try:
            self._fill(self._inputs, actions, next_positions)
            if pending not in self._runs:
                step = self._step.deriving if pending else self._step.plain
                return self._first_run(step, self._inputs, pending, len(actions))
            return self._runs[pending]()[: len(actions)]
        except Exception as error:  # compilers and drivers raise what they like
            self._give_up(f'{type(error).__name__}: {error}')
            return None

    def outputs(self, answers: torch.Tensor) -> StepOutputs:
        """The parts of what :meth:`run` gave, ``[B, 1, ...]`` each."""
        world_model = self._resources.world_model
        embed, support = self._resources.manager.layout.embed_dim, world_model.support_size
        actions = answers.shape[1] - 2 * embed - 2 * support
        hidden, latent, reward, policy, value = answers[:, None].split(
            [embed, embed, support, actions, support], dim=-1
        )
        return StepOutputs(hidden, latent, reward, policy, value)

    def _first_run(self, step: Function, inputs: StepInputs, pending: bool, rows: int) -> torch.Tensor:
        """Make a runner and compare its first answer in the rows in use. A step reads nothing that it
        writes, so it can be taken twice; the plain function comes last, so that what stays is its."""
        run = RUNNERS[self._backend](step, inputs)
        got, expected = run()[:rows], step(inputs)[:rows]
        if not torch.isfinite(expected).all():
            return expected  # broken weights, which the search refuses; they are no test of the runner
        largest = expected.abs().amax().clamp_min(1.0)
        tolerance = TOLERANCE.get(expected.dtype, 5e-2) * float(largest)
        if not torch.allclose(got, expected, rtol=0.0, atol=tolerance):
            self._give_up(f'its answers differ by up to {float((got - expected).abs().amax()):.2g}')
        else:
            self._runs[pending] = run
        return expected

    def _give_up(self, reason: str) -> None:
        self._failed, self._runs = True, {}
        warnings.warn(
            f'kv_cache.backend={self._backend!r} does not work here and searches go on with the backend '
            f"'eager', whose results are the same: {reason.strip()}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _take_weights(self) -> None:
        """Weights that changed in place leave the runners valid; weights in other memory do not."""
        self._seen = self._resources.weights
        if self._weights is not None and self._weights.in_place():
            self._weights.refresh()
            return
        resources = self._resources
        self._weights = InferenceWeights(resources.world_model, precision=None)
        self._step = StepFunction(
            resources.world_model, self._weights, resources.window.kept, resources.exact
        )
        self._runs = {}

    def _make_inputs(
        self, storage: torch.Tensor, memory: torch.Tensor, shift: torch.Tensor | None
    ) -> StepInputs:
        resources, kept, simulations = self._resources, self._resources.window.kept, self._simulations
        world_model, geometry = resources.world_model, resources.geometry
        longest = SearchTree.longest_path(simulations, kept - 1 if resources.exact else kept)
        self.numbers = np.zeros((self.rows, NUMBERS + kept + min(longest, LONGEST_PATH)), np.int64)
        shape = geometry.layers, 2, geometry.heads, TOKENS_PER_STEP, geometry.head_dim
        sizes = self._sizes(simulations)
        steps, tokens = memory[: sum(sizes)].split(sizes)
        with torch.inference_mode(False):
            host = torch.from_numpy(self.numbers)
            continuous = world_model.action_space_size if world_model.continuous_action_space else 0
            rotation = storage.new_zeros(0)
            if isinstance(resources.positions, RotaryPositions):
                like = resources.positions.factors(np.zeros(1, np.int64))
                rotation = like.new_zeros(self.rows, kept + TOKENS_PER_STEP, geometry.head_dim // 2, 2)
            return StepInputs(
                storage,
                steps.view(-1, *shape),
                tokens.view(-1, resources.manager.layout.embed_dim),
                host if storage.device.type == 'cpu' else torch.empty_like(host, device=storage.device),
                storage.new_zeros(self.rows, continuous),
                rotation,
                storage.new_zeros(0) if shift is None else torch.zeros_like(shift),
            )

    def _fill(self, inputs: StepInputs, actions: torch.Tensor, next_positions: np.ndarray) -> None:
        rows = len(actions)
        if inputs.numbers.device.type != 'cpu':
            refill(inputs.numbers, self.numbers)
        if inputs.actions.numel():
            inputs.actions[:rows] = actions.to(inputs.actions)
        else:
            inputs.numbers[:rows, ACTION] = actions.reshape(-1)
        positions, kept = self._resources.positions, self._resources.window.kept
        if isinstance(positions, RotaryPositions):
            shown = next_positions[:, None] + np.arange(-kept, TOKENS_PER_STEP)
            inputs.rotation[:rows] = positions.factors(shown)


class CompiledSearch(Search):
    """As :class:`Search`; a simulation is one call of the static step.

    A simulation that looks at a longer path, whose root is not stored, or for which a window would have to be
    evicted, is taken by :class:`Search` itself, on the same storage.

    Args:
        static: serves searches of so many rows.
        memory: flat, :meth:`StaticStep.elements` finite numbers of no meaning.
    """

    def __init__(
        self,
        static: StaticStep,
        resources: InferenceResources,
        roots: RootBatch,
        simulations: int,
        memory: torch.Tensor,
        stored_steps: int,
    ) -> None:
        inputs, memory = static.begin(simulations, memory)
        super().__init__(resources, roots, simulations, memory, 0)
        self._static = static
        # nothing is written there while the search runs, even where the roots are cleared
        self._roots_at = super()._root_slots(self._rows) if roots.stored else None
        rows = len(roots.lengths)
        self._steps = inputs.steps[: rows * simulations]
        self.tree.keep_steps(stored_steps)
        columns = len(inputs.tokens) // static.rows
        tokens = inputs.tokens.view(static.rows, columns, -1)[:rows]
        tokens[:, : self.tree.tokens.shape[1]] = self.tree.tokens
        self.tree.tokens = tokens

    def expand(self, parents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add one child to every row's tree: :meth:`Search.expand`."""
        of = self.tree.of(parents)
        slots = self._plan(of)
        self._placed = np.full(len(parents), NOWHERE)
        if slots is None:
            return super().expand(parents, actions)
        pending = self._address(of, slots)
        answers = self._static.run(actions, of.next_positions, bool(pending.any()))
        if answers is None:  # slots that nothing was written to
            self._manager.recur_pool.discard(self._keys(of, pending))
            return super().expand(parents, actions)
        nodes, rows = of.windows[pending], self._rows[pending]
        self._manager.count_step(TOKENS_PER_STEP * len(parents), int(of.lengths[~pending].sum()))
        before = self._derived_before[nodes, rows]
        self._manager.count_window(int(of.lengths[pending][~before].sum()))
        self._manager.count_rebuilt(int(of.lengths[pending][before].sum()), roots=False)
        self._derived_before[nodes, rows] = True
        self._held[nodes, rows] = of.lengths[pending][:, None]
        found = ~pending
        found[rows[~before]] = True
        derived = self.tree.add(of)
        if self._by_priority:
            self._visit(self.tree.expanded)
        outputs = self._static.outputs(answers)
        if self._resources.observers:
            self._tell(of, actions, found, derived, outputs, self._show(of))
        return outputs

    def _plan(self, of: Parents) -> np.ndarray | None:
        """Slots of the windows, int64 ``[B]``, ``NO_SLOT`` where they are pending; None where the simulation
        has to be taken eagerly."""
        pool = self._manager.recur_pool
        slots = self._slots(of)
        pending = slots == NO_SLOT
        longest = self._static.numbers.shape[1] - NUMBERS - self._resources.window.kept
        deep = int(of.below.max()) > longest if self._resources.exact else int(of.on_path.max()) > 2 * longest
        lost = pending & (of.below > 0)
        if self._roots.stored:
            lost |= pending & (of.windows == ROOT)
        moved = not self._static.holds(self._manager.storage.tensor)
        if not self._static.serves(len(slots)) or moved or deep or lost.any():
            return None
        return None if pool.pool_size - len(pool) < np.count_nonzero(pending) else slots

    def _root_slots(self, rows: np.ndarray) -> np.ndarray:
        assert self._roots_at is not None
        return self._roots_at[rows]

    def _slots(self, of: Parents) -> np.ndarray:
        """Slots of the windows, int64 ``[B]``; ``NO_SLOT`` where there is none."""
        slots = self._manager.slots(self._keys(of, np.ones(len(self._rows), dtype=bool)))
        return slots if self._roots_at is None else np.where(of.windows == ROOT, self._roots_at, slots)

    def _keys(self, of: Parents, which: np.ndarray) -> list[NodeKey]:
        """Names of the windows of some rows (bool ``[B]``)."""
        pairs = zip(self._rows[which].tolist(), of.windows[which].tolist(), strict=True)
        return [NodeKey(*pair) for pair in pairs]

    def _address(self, of: Parents, slots: np.ndarray) -> np.ndarray:
        """Take slots for the windows that the step computes, and fill in its numbers; returns the rows whose
        windows are pending (bool ``[B]``)."""
        manager, rows = self._manager, self._rows
        cached = of.windows != ROOT if self._roots.stored else of.windows >= ROOT
        manager.lookup(self._keys(of, cached))
        pending = slots == NO_SLOT
        numbers = self._static.numbers[: len(rows)]
        scratch = manager.storage.slots
        numbers[:, WINDOW] = np.where(pending, scratch, slots)
        numbers[:, OWN] = scratch
        if pending.any():
            keys = self._keys(of, pending)
            numbers[pending, OWN] = manager.reserve(keys, of.lengths[pending], of.next_positions[pending])
            kept = self._resources.window.kept
            numbers[:, NUMBERS : NUMBERS + kept] = self.tree.shown(of)
        path = self.tree.path(of)
        numbers[:, PENDING] = pending
        numbers[:, LENGTH] = of.lengths
        numbers[:, PATH] = of.on_path
        numbers[:, VISIBLE] = of.lengths - of.on_path
        held = self._held[of.windows, rows, 0]
        numbers[:, HELD] = np.where(pending, of.lengths, held)
        at = numbers[:, NUMBERS + self._resources.window.kept :]
        depth = min(path.shape[1], at.shape[1])
        if depth:
            at[:, at.shape[1] - depth :] = (
                np.maximum(path[:, path.shape[1] - depth :] - 1, 0) * len(rows) + rows[:, None]
            )
        stored = ~self.tree.will_derive(of)
        begin = self.tree.expanded * len(rows)
        numbers[:, STEP] = np.where(stored, begin + rows, len(self._static.steps) - 1)
        if self._resources.exact:
            numbers[:, TOKEN] = rows * self.tree.tokens.shape[1] + self.tree.next_column
        return pending

    def _show(self, of: Parents) -> int:
        """Bring beside the rows what the step read and wrote, for observers; returns the column behind."""
        rows = self._rows
        self._resident.load(rows, self._slots(of), self._resources.window.kept)
        depth = self._place_path(of) if of.below.any() else 0
        begins, _, end = self._look(of, depth)
        correction = None
        if self._shift is not None:
            self._without_positions(rows)
            correction = self._correct(of, begins[0], end)
        begin = (self.tree.expanded - 1) * len(rows)
        own = self._steps[begin : begin + len(rows)]
        if correction is not None:
            own = own + correction[..., -TOKENS_PER_STEP:, :]
        self._shown[..., end : end + TOKENS_PER_STEP, :] = own
        self._placed = np.full(len(rows), NOWHERE)
        return end + TOKENS_PER_STEP
