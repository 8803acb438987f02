"""`unitrain chaos`: a run is disturbed from outside, on purpose, and must end as one that nobody disturbed."""
