"""Loops: the array-API reference of each op, with kernels in folders by place."""
