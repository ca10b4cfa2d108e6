"""Poisoning backdoor attacks and training-time defences on image classifiers."""

__version__ = "0.1.0"
