"""Measurements, each with its reproduce line and a committed result."""
