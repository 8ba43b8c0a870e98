"""The demo: a MaskGIT trained from nothing in minutes, on handwritten digits or on a text of yours.

Digits are scikit-learn's ``load_digits``: 1797 images of 8x8 pixels, here in 5 grey levels, 64 tokens. Needs the
extra ``demo``: tqdm, matplotlib, scikit-learn, x-transformers.
"""

from fastmask.demo.command_line import add_arguments, run

__all__ = ["add_arguments", "run"]
