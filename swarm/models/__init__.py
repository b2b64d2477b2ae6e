"""Models: where checkpoints come from, how they are cut into spans, and the bundled demo model."""
