"""From examples to what a model takes: its chat template, its processor, pictures, sounds and films."""
