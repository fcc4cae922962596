"""Serving: pools of replicas, the traffic they carry within their promises, and the search for the best of them."""
