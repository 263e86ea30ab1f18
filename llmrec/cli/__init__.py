"""The `llmrec` command: `main` declares the commands, one module each holds what a command does."""
