"""Implicit methods: stage equations solved by Newton's method, and their transposes."""
