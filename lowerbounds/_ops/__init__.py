"""Loops: the array-API reference of each op, faster bodies in folders beside."""
