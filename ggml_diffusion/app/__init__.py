"""What a person meets: the command line, what a run shows while it is going, the demo, and `inspect`.

Turns flags into settings and results into text. No other wing prints or exits.
"""
