"""Traces: which experts requests activated, while they run, afterwards, and on disk."""
