"""The choice of a method for each head.

`Auto`, the table of `explain`, and the calibration of the cost model.
"""
