"""Data sheets of accelerators, FLOPs, and the roofline that follows from both."""
