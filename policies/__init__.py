"""Eviction policies: pure decisions, one small dataclass each."""
