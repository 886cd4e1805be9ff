"""Kernels for weights of any shape, which a library compiled ahead of the model needs.

Sizes come with each call. Activations of many tokens lie in wide tiles, ``[features, tokens of the
tile]`` one after another, so that distances inside a tile do not depend on the number of features:
that makes these kernels as fast as those for one shape. ``y`` of a linear begins each tile with one
feature more, where slots of a group of rows that have no row put their sums.
"""
