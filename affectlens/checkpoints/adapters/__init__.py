"""PEFT adapters and bare trainables: the names of their factors, how these become a change, and over what."""
