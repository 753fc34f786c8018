"""Stage two: train sparse replacements of one MLP against a store, starting from the MLP's own weights."""
