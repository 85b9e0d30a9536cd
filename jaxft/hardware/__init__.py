"""Accelerator data sheets, FLOP counts, and a roofline model that combines them."""
