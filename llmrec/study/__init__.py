"""Studies: many trainings of one question, planned, run one after another, and reported together."""
