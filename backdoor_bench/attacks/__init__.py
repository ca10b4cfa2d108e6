"""Attacks: which rows x which trigger x which label -> PoisonedSet; one method a file."""
