"""From a checkpoint to a model in memory, of which nothing is random and nothing a stranger's program."""
