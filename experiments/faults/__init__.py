"""Faults on purpose in trainings over many processes, and what comes of them."""
