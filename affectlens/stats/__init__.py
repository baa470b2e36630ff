"""Statistics: arrays in, numbers out; neither torch nor tables are known here."""
