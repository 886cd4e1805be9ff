"""Compiled models as files: the container, the graphs and the weights in it, and whom to trust."""
