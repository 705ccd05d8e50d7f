"""RMS norms: one order of summation for every number of rows."""
