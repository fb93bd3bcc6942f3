"""Presets: which layers stay in high precision, with the evidence."""
