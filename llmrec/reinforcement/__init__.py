"""Training beyond the next token: rewards over constrained rollouts, and preferences between items."""
