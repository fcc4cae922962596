"""Fits the constants of devices, fabrics and software stacks to a user's own measurements, and takes such measurements."""

from planner.calibration.robust_fit import Constant, Errors, Fit, Fitted, Kept, fit

__all__ = ["Constant", "Errors", "Fit", "Fitted", "Kept", "fit"]
