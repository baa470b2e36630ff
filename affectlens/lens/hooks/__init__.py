"""What passes in a forward pass: where, at which positions, seen and rewritten."""
