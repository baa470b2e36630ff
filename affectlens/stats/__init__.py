"""STATISTICS: arrays in, numbers out; neither torch nor tables are known here.

intervals: 95 % intervals of proportions, means and paired differences · ranks: agreement of rankings
"""
