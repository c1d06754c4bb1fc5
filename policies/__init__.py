"""Eviction policies: numbers in, plan out. Imported as `heatkv.policies`."""
