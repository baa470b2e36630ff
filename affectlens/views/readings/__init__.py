"""What a table says, read once: the numbers that figures and sentences share."""
