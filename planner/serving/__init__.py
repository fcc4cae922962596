"""Serving pools under load: bound, fixed point, birth–death chain and discrete-event simulation of one iteration time."""
