"""Loaders: one file a data set, each returning a Dataset; batched augmentation; checks; safe reading of files."""
