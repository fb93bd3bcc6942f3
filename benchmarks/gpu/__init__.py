"""What only a GPU can tell: a program of its own, see `__main__`."""
