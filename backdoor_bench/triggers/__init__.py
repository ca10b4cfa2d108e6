"""Stamping functions: uint8 image batches in, new uint8 image batches out; one family a file."""
