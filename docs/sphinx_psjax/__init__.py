"""What the site needs of Sphinx: docstrings, mathematics, the reference, tables, errors."""
