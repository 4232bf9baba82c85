"""What can be wrong: causes of the old system's answers, and faults of the manager's."""

from __future__ import annotations

from enum import Enum


class Cause(Enum):
    """Why the old system's answer is not that of the node's own history. Each is decided by evidence."""

    SLOT_OVERWRITTEN = 'slot_overwritten'
    OTHER_ENVIRONMENT = 'other_environment'
    EQUAL_LATENTS = 'equal_latents'
    ZERO_PADDING = 'zero_padding'
    ROOT_LOST = 'root_lost'
    RESTARTED = 'restarted'
    CRASHED = 'crashed'
    WINDOW_CORRECTION = 'window_correction'
    ROTARY_POSITION = 'rotary_position'

    @property
    def sentence(self) -> str:
        """What happened, for people."""
        return _CAUSES[self]


class Fault(Enum):
    """What a manager that is off has served instead; each is recognised in the tensors."""

    ANOTHER_NODE = 'another_node'
    STALE_ENTRY = 'stale_entry'
    OTHER_ENVIRONMENT = 'other_environment'
    KEYS_AND_VALUES_EXCHANGED = 'keys_and_values_exchanged'
    TOKEN_OFFSET = 'token_offset'
    POSITION_OFFSET = 'position_offset'
    PERTURBED = 'perturbed'
    ENTRY_LOST = 'entry_lost'
    UNKNOWN = 'unknown'

    @property
    def sentence(self) -> str:
        """What happened, for people."""
        return _FAULTS[self]


_CAUSES = {
    Cause.SLOT_OVERWRITTEN: 'the slot was written again for another history, and its old key stayed',
    Cause.OTHER_ENVIRONMENT: "another environment's entry was served",
    Cause.EQUAL_LATENTS: 'two histories have the same latent state, which is all that the key is made of',
    Cause.ZERO_PADDING: 'shorter rows of the batch were padded with zero keys, which attention sees',
    Cause.ROOT_LOST: 'the root is stored, but its observation, encoded again, gives another key',
    Cause.RESTARTED: 'the context was gone, and the old system began again from one token',
    Cause.CRASHED: 'an entry or an input was missing, and the old system ends with an error there',
    Cause.WINDOW_CORRECTION: 'a full window moved, and its keys and values were not computed again',
    Cause.ROTARY_POSITION: 'tokens were rotated to other positions than those of their steps',
}

_FAULTS = {
    Fault.ANOTHER_NODE: 'what was served belongs to another node of the same search',
    Fault.STALE_ENTRY: 'what was served belongs to an earlier state of the same environment',
    Fault.OTHER_ENVIRONMENT: 'what was served belongs to another environment',
    Fault.KEYS_AND_VALUES_EXCHANGED: 'keys and values of a layer are exchanged',
    Fault.TOKEN_OFFSET: 'the history is one token off',
    Fault.POSITION_OFFSET: 'a token stands at another position than its own',
    Fault.PERTURBED: 'the numbers differ a little everywhere, more than rounding explains',
    Fault.ENTRY_LOST: 'the entry was stored and never evicted or cleared, and is not there',
    Fault.UNKNOWN: 'no pattern was recognised',
}
