"""Serving pools: what they hold, the plans for them, and how they fare under load, from a bound to a simulation."""
