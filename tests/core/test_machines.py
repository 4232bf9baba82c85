"""Stateful tests of pool and manager against the slow references, for every policy."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lzero_kv.cache.keys import NodeKey, RootKey

from .comparing import BROKEN
from .twins import ManagerTwins, PoolTwins

POLICIES = ('fifo', 'lru', 'lfu', 'priority')
MACHINE = settings(max_examples=30, stateful_step_count=40, deadline=None, derandomize=True)

pool_keys = st.integers(0, 8)
node_keys = st.builds(NodeKey, st.integers(0, 2), st.integers(0, 4))
root_keys = st.builds(RootKey, st.integers(0, ManagerTwins.ENVIRONMENTS - 1), st.integers(0, 3))
manager_keys = root_keys | node_keys
unknown_environment = st.just(RootKey(ManagerTwins.ENVIRONMENTS, 1))
lengths = st.integers(0, 7)


def some(keys: st.SearchStrategy) -> st.SearchStrategy[list]:
    return st.lists(keys, max_size=6, unique=True)


def histories(keys: st.SearchStrategy) -> st.SearchStrategy[list[tuple]]:
    """Different keys, each with a length."""
    return st.lists(st.tuples(keys, lengths), max_size=6, unique_by=lambda pair: pair[0])


class PoolMachine(RuleBasedStateMachine):
    policy = 'lru'

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.twins = PoolTwins(self.policy, seed=seed)

    @rule(keys=st.lists(pool_keys, max_size=7))
    def lookup(self, keys):
        self.twins.lookup(keys)

    @rule(pairs=histories(pool_keys), spare=st.integers(0, 2))
    def store(self, pairs, spare):
        self.twins.store([key for key, _ in pairs], [length for _, length in pairs], spare)

    @rule(key=pool_keys, length=lengths)
    def store_twice(self, key, length):
        self.twins.store([key, key], [length, length])

    @rule(keys=some(pool_keys))
    def load(self, keys):
        self.twins.load(keys)

    @rule()
    def load_all(self):
        self.twins.load(self.twins.reference.keys())

    @rule(key=pool_keys)
    def get(self, key):
        self.twins.get(key)

    @rule(key=pool_keys, length=lengths)
    def set(self, key, length):
        self.twins.set(key, length)

    @rule(keys=st.lists(pool_keys, max_size=3))
    def discard(self, keys):
        self.twins.both('discard', keys)

    @rule(key=pool_keys, value=st.integers(-3, 3).map(float))
    def set_priority(self, key, value):
        self.twins.both('set_priorities', [key], [value])

    @rule(value=st.lists(st.integers(0, 5).map(float), min_size=4, max_size=4))
    def set_all_priorities(self, value):
        keys = self.twins.reference.keys()
        self.twins.both('set_priorities', keys, (value * 2)[: len(keys)])

    @rule(
        keys=st.lists(pool_keys, min_size=1, max_size=4, unique=True), mistake=st.sampled_from(sorted(BROKEN))
    )
    def rejected_store(self, keys, mistake):
        self.twins.rejected_store(keys, mistake)

    @rule()
    def clear(self):
        self.twins.both('clear')

    @rule(size=st.integers(1, 6))
    def resize(self, size):
        self.twins.both('resize', size)

    @invariant()
    def agrees(self):
        if hasattr(self, 'twins'):
            self.twins.compare()


class ManagerMachine(RuleBasedStateMachine):
    policy = 'lru'

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.twins = ManagerTwins(self.policy, seed=seed)

    @rule(keys=st.lists(manager_keys | unknown_environment, max_size=7))
    def lookup(self, keys):
        self.twins.lookup(keys)

    @rule(pairs=histories(manager_keys), spare=st.integers(0, 2))
    def store(self, pairs, spare):
        self.twins.store([key for key, _ in pairs], [length for _, length in pairs], spare)

    @rule(pairs=histories(node_keys), spare=st.integers(0, 2))
    def store_nodes(self, pairs, spare):
        self.twins.store([key for key, _ in pairs], [length for _, length in pairs], spare)

    @rule(pairs=histories(manager_keys), stray=unknown_environment)
    def store_for_unknown_environment(self, pairs, stray):
        self.twins.store([*(key for key, _ in pairs), stray], [*(length for _, length in pairs), 2])

    @rule(keys=st.lists(manager_keys, max_size=7), spare=st.integers(0, 3), into_buffer=st.booleans())
    def load(self, keys, spare, into_buffer):
        self.twins.load(keys, spare, into_buffer)

    @rule(env_id=st.integers(0, ManagerTwins.ENVIRONMENTS - 1), key=manager_keys)
    def hierarchical_get(self, env_id, key):
        self.twins.get(env_id, key)

    @rule(key=manager_keys, length=lengths)
    def set(self, key, length):
        self.twins.set(key, length)

    @rule(least=st.integers(0, 10), more=st.integers(0, 5), upfront=st.booleans())
    def begin_search(self, least, more, upfront):
        self.twins.begin_search(least, more, upfront)

    @rule(pairs=histories(node_keys))
    def reserve(self, pairs):
        self.twins.reserve([key for key, _ in pairs], [length for _, length in pairs])

    @rule(keys=st.lists(manager_keys, max_size=3))
    def discard(self, keys):
        self.twins.pool_operation('discard', keys)

    @rule(key=manager_keys, value=st.integers(-3, 3).map(float))
    def set_priority(self, key, value):
        self.twins.pool_operation('set_priorities', [key], [value])

    @rule(which=st.sampled_from(['all', 'roots', 'nodes']))
    def clear(self, which):
        self.twins.clear(which)

    @rule(tokens=st.integers(0, 9), roots=st.booleans())
    def count_rebuilt(self, tokens, roots):
        self.twins.count_rebuilt(tokens, roots)

    @invariant()
    def agrees(self):
        if hasattr(self, 'twins'):
            self.twins.compare()


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('machine', [PoolMachine, ManagerMachine], ids=['pool', 'manager'])
def test_agrees_with_the_reference(machine, policy):
    bound = type(machine.__name__, (machine,), {'policy': policy})
    run_state_machine_as_test(bound, settings=MACHINE)
