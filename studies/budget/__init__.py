"""Study of layer budgets: a trained world model, its budgets, the measures and their tables."""
