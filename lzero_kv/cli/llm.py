"""`lzero-kv llm`: layer budgets of language models measured beside the full cache, and the report."""
