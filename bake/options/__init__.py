"""Every option, declared once: name, kind, default, help, heading, and which commands have it.

The command line, recipes, the Python signatures (held equal by a test) and the reference page follow from
what stands here.
"""
