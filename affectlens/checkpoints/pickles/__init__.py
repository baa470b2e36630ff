"""Torch's own files, `.bin .pth .pt`: read as data, and nothing that they name is ever called."""
