"""What the pools counted, for people: TensorBoard charts, tables, plots, and reading charts back."""
