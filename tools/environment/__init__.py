"""The set-up of the project's virtual environment, in stages that are remembered. Standard library only."""
