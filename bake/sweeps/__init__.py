"""What each strength does, and what it costs: dose and response, from hooks on one loaded model.

In the order in which they read: `options` is what is asked for; `arms` are what is compared, rows of one
batch; `measurements` what they do to texts; `summary` turns those into `points` with intervals; `window`
says which strengths stay within bounds; `controls` are random directions; `design` says what a sweep
compares; `findings` what it found; `sweep` measures and `store` lets it go on after a break;
`attribution` asks which layers do it. `run` does a sweep from beginning to end into a directory:
`results`, `files`, `page`, `description`. `auto` picks a multiplier; `evidence` is a sweep in a card.
"""
