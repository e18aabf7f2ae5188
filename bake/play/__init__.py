"""`bake play` and `bake space`: a page on which base and steered model answer side by side.

`stage` is what the page does, without a page; `app` draws it with Gradio; `space` writes the folder of a
Hugging Face Space that shows the same.
"""
