"""Stage one: run a Hugging Face model once and keep the inputs and outputs of its MLPs in a Zarr store."""
