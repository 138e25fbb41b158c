"""Promises under violence: `make torture` kills, cuts, flips and fills; it counts what held."""
