"""Partitioned quasi-Newton on the test functions that partial separability was invented for."""
