"""Tutorials as short programs. ``aca-ext examples`` lists them and runs one."""
