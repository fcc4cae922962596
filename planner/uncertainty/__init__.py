"""How far a prediction may be off: intervals from what published runs measured, and the weakest number that it rests on."""
