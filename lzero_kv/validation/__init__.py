"""Two systems side by side: what each served, who is right, and why the other is not.

Nothing here knows a host. Three opinions meet on every compared row: the manager's, the old system's, and
a recomputation of the row's own history. ``causes`` names what can be wrong, ``deviation`` measures it,
``tally`` counts it, ``finding`` says it to a person, ``record`` keeps it in a file.
"""
