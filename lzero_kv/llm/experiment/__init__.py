"""Experiment platform: documents, methods and their scores under layer budgets."""
