"""Contestants, one file per group of libraries; the table of them is contestants.py.

The libraries that are compared are imported where they are used: one that is missing leaves out
its own contestants alone.
"""
