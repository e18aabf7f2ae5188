"""A steered model in memory: heard at any strength before it is baked, by the hooks of the proof.

`steering` prepares a model once and gives a push for every setting of the knobs, `writing` continues
prompts under several of them side by side, `talk` keeps a conversation with them, `handle` steers a model
that Python holds.
"""
