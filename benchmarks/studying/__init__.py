"""The parts of the study of layer budgets: its subject, its plays, its measures, its methods, its picture."""
