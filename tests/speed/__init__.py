"""
What users wait for, in figures: `scripts/bench`. A module for each kind of question, and the peers that we are measured by.
"""
