"""Measurements of any policy on any model. Imported as `heatkv.profiling`."""
