"""Blocks for strangers: sessions, scheduling, key-value memory and the device thread."""
