"""Stage three: read an MLP, and a module trained to replace it, as a weighted sum of rank-one tensors."""
